# quantgrid: start with `make run` and `make test`; both create an environment from pinned versions.
# Variables:
#   CONFIG       a config file
#   CORES        processor cores of a run
#   WARM=0       start every job in a fresh interpreter, not as a fork of one with all imports
#   PROFILE      a folder of workflow/profiles
#   STUDY        name of a study (table, figure)
#   MODEL, BITS, CORPUS, DEPLOYMENT    of recommend and export; MODEL, BITS, KIND, TO of best
#   CELL, TO     of export: name of a cell, format
#   RESULTS, OUT           of redraw; OUT of export: a new folder
#   MODELS       names of reference models (reference-models)
#   BENCH        names of benchmarks (bench)
#   ARGS         further options of the command
#   PYTHON       interpreter for a new environment
#   TORCH_INDEX  package index of torch alone; an index of CPU builds saves the CUDA libraries

PYTHON ?= python3
CONFIG ?= config/config.yaml
CORES ?= all
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= default
PEERS := .venv-peers
GPTQMODEL := .venv-gptqmodel
XLLAMACPP := .venv-xllamacpp
SERVING := .venv-serving
SITE := .venv-docs
# Two processes with one thread each; the tests of one file share fixtures and stay together.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
BENCH ?= fake_quantize low_rank online_rotation learning evaluation tasks jobs sequential gptq grid search gpu
INSTALL := python -m pip install --quiet --disable-pip-version-check
HASHED := --require-hashes --no-deps
START = $(if $(filter 0,$(WARM)),--cold,$(if $(WARM),--warm))
# Profiles other than the default set the number of cores themselves.
WORKFLOW = $(BIN)/python scripts/run_workflow.py --configfile $(CONFIG) --profile $(PROFILE) $(if $(filter default,$(PROFILE)),--cores $(CORES)) $(START)

.PHONY: run test test-all test-slow test-nightly stress bench bench-plan bench-growth smoke reference-models dry-run table figure redraw recommend best export clean-unused verify docs site reference graph lint lock help

run: $(VENV)/.installed  ## the workflow of CONFIG, from models to report
	$(WORKFLOW) $(ARGS)

dry-run: $(VENV)/.installed  ## planned jobs of a run by rule, with an estimate of hours and disk
	@$(BIN)/python scripts/estimate_run.py --configfile $(CONFIG)
	$(WORKFLOW) --dry-run --quiet rules host $(ARGS)

smoke: $(VENV)/.installed  ## every method and format once on the smallest reference model, in minutes
	$(BIN)/python scripts/run_workflow.py --configfile config/smoke.yaml --cores $(CORES) $(START) $(ARGS)

table: $(VENV)/.installed  ## one table and what it needs: make table STUDY=formats
	$(WORKFLOW) --table "$(STUDY)" $(ARGS)

figure: $(VENV)/.installed  ## one figure and what it needs: make figure STUDY=formats
	$(WORKFLOW) --figure "$(STUDY)" $(ARGS)

redraw: $(VENV)/.installed  ## figures of CONFIG's studies from a results.csv alone, in seconds: make redraw RESULTS=results.csv OUT=redrawn
	@$(BIN)/python scripts/redraw_figures.py --configfile $(CONFIG) --results "$(RESULTS)" --folder "$(OUT)" $(if $(STUDY),--study $(STUDY))

recommend: $(VENV)/.installed  ## recipes within BITS stored bits per weight for each kind of deployment: make recommend MODEL=smollm2-135m BITS=4.5 (DEPLOYMENT=weights, CORPUS=...)
	@$(BIN)/python scripts/recommend.py --configfile $(CONFIG) --model "$(MODEL)" --bits "$(BITS)" --corpus "$(CORPUS)" --deployment "$(DEPLOYMENT)" $(ARGS)

best: $(VENV)/.installed  ## the best recipe of a model by a race of over 200: make best MODEL=FOLDER BITS=4.5 KIND=w4a16|w4a4 (MODEL: a folder, or an entry of CONFIG; TO=... for recipes that an export target holds)
	@$(BIN)/python scripts/best.py --configfile $(CONFIG) --model "$(MODEL)" --bits "$(BITS)" --kind "$(KIND)" $(if $(TO),--to "$(TO)") --cores $(CORES) $(ARGS)

export: $(VENV)/.installed  ## a recipe for servers: make export MODEL=... TO=compressed-tensors|gguf|gptq|awq|dense OUT=... (CELL=..., or the best within BITS)
	@$(BIN)/python scripts/export.py --configfile $(CONFIG) --model "$(MODEL)" --to "$(TO)" --out "$(OUT)" $(if $(CELL),--cell "$(CELL)") $(if $(BITS),--bits "$(BITS)") $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(DEPLOYMENT),--deployment "$(DEPLOYMENT)") $(ARGS)

reference-models: $(VENV)/.installed  ## train the models of models/ from scratch, hours on one core: all, or MODELS="reference-1m"; resumable
	$(BIN)/python scripts/train_reference_models.py $(MODELS) $(ARGS)

clean-unused: $(VENV)/.installed  ## files of cells and steps that CONFIG no longer plans, listed; YES=1 deletes them
	$(BIN)/python scripts/clean_unused.py --configfile $(CONFIG) $(if $(YES),--delete)

verify: $(VENV)/.installed  ## verify every file of CONFIG's results against its record; REPAIR=1 deletes damaged files, ADOPT=1 records files without a record
	@$(BIN)/python scripts/verify_results.py --configfile $(CONFIG) $(if $(REPAIR),--repair,$(if $(ADOPT),--adopt))

test: lint  ## linters and the tests of every change: units, the smoke run with golden numbers, one real model; 10 minutes on 2 cores
	$(PYTEST) -m "not slow and not damage and not nightly" $(ARGS)

test-all: test test-slow  ## make test and everything that it leaves out, apart from test-nightly; 45 minutes on 2 cores

test-slow: $(VENV)/.installed-dev  ## the part of test-all that test leaves out: whole products of cases, faults, kills, Slurm, a browser
	$(PYTEST) -m "(slow or damage) and not nightly" $(ARGS)

test-nightly: $(VENV)/.installed-dev $(XLLAMACPP)/.installed $(SERVING)/.installed  ## the longest tests: the smoke run through 30 kills at random moments, servers that load exports
	$(PYTEST) -m nightly $(ARGS)

stress: $(VENV)/.installed-dev  ## the smoke run through 30 kills at random moments, with the same results in the end
	$(BIN)/python tests/kill_at_random.py $(ARGS)

bench: $(VENV)/.installed-dev $(if $(filter gptq grid,$(BENCH)),$(PEERS)/.installed) $(if $(filter gptq,$(BENCH)),$(GPTQMODEL)/.installed)  ## speed and memory, into results/benchmarks.csv and .md: all, or BENCH="gptq sequential"
	$(foreach part,$(BENCH),$(BIN)/python tests/benchmarks/$(part).py $(ARGS) &&) true

bench-plan: $(VENV)/.installed-dev  ## time and memory of planning (paper grid, 10,000 cells), into results/benchmarks-plan.csv and .png
	$(BIN)/python tests/benchmarks/dry_run.py

bench-growth: $(VENV)/.installed-dev  ## exponents of time and memory against hidden size, layers, tokens, cells, into results/benchmarks-growth.csv, .png, .svg
	$(BIN)/python tests/benchmarks/growth.py $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff (rules and format), mypy, import contract, codespell, snakefmt, snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=scripts $(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

# First all packages by sha256. Then torch by its exact version alone, with the CUDA libraries that
# its GPU builds require: indexes differ in their builds, so no list of hashes fits all machines.
$(VENV)/.installed: envs/requirements.txt envs/requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantgrid needs Python 3.11 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) $(HASHED) -r envs/requirements.lock
	$(if $(TORCH_INDEX),$(BIN)/$(INSTALL) --no-deps --index-url $(TORCH_INDEX) $$(grep '^torch==' envs/requirements.txt))
	$(BIN)/$(INSTALL) -r envs/requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed envs/requirements-dev.txt envs/requirements-dev.lock envs/requirements-slurm.lock
	$(BIN)/$(INSTALL) $(HASHED) -r envs/requirements-dev.lock -r envs/requirements-slurm.lock
	$(BIN)/$(INSTALL) -r envs/requirements-dev.txt
	@touch $@

$(PEERS)/.installed $(GPTQMODEL)/.installed $(XLLAMACPP)/.installed $(SERVING)/.installed $(SITE)/.installed: .venv-%/.installed: envs/requirements-%.txt envs/requirements-%.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(INSTALL) $(HASHED) -r envs/requirements-$*.lock
	$(@D)/bin/$(INSTALL) -r $<
	@touch $@

lock: $(VENV)/.installed-dev  ## envs/*.lock from the versions in envs/*.txt: run it after an edit of one of those
	for name in $(basename $(wildcard envs/*.txt)); do \
	  { echo "# Made by \`make lock\` from $$(basename $$name).txt: the same versions with the sha256 of every file that the index has of them, without torch."; \
	    grep -v '^-r' $$name.txt | $(BIN)/uv pip compile - --quiet --no-deps --generate-hashes --no-annotate --no-header --no-emit-index-url \
	      --no-emit-find-links --no-emit-package torch --python-version 3.11; } > $$name.lock.new && mv $$name.lock.new $$name.lock || exit 1; \
	done

docs: $(VENV)/.installed  ## the results of the default run into README.md and docs/
	$(BIN)/python docs/update.py

reference: $(VENV)/.installed  ## reference pages of the documents from schema, registry, Makefile and rules
	$(BIN)/python docs/reference_pages.py

site: $(SITE)/.installed  ## the documentation site into build/site; a broken link is an error
	$(SITE)/bin/mkdocs build --strict

graph: $(VENV)/.installed  ## pictures of rules and files: docs/reference/rulegraph.md, which GitHub draws, and docs/reference/filegraph.svg, which needs graphviz
	{ echo '# Rule graph'; echo; echo '## One cell, from the model to the report'; echo; $(BIN)/python docs/cell_graph.py; echo; \
	  echo 'The outputs of a rule are listed below its name. Arrows implied by longer paths are omitted: nearly all rules read the model, for example.'; echo; \
	  echo '## All rules of the smoke run'; echo; echo '```mermaid'; \
	  PYTHONHASHSEED=0 $(BIN)/python -m snakemake --configfile config/smoke.yaml --rulegraph mermaid-js 2>/dev/null | sed '/^---/,/^---/d; /style/d'; echo '```'; \
	  echo; echo '![Rules with the files that they read and write](filegraph.svg)'; echo; echo '`make graph` makes all three.'; } > docs/reference/rulegraph.md
	PYTHONHASHSEED=0 $(BIN)/python -m snakemake results-smoke/report.html --configfile config/smoke.yaml --filegraph 2>/dev/null \
	  | sed -E 's/&lt;(input )?function[^<>]*&gt;|&lt;bound method[^<>]*&gt;&gt;/(from the plan)/g; s/\{([a-z]+),[^{}]*(\{[0-9]+\})?\}/{\1}/g; s/\b[0-9a-f]{10}\b/{key}/g' \
	  | dot -Tsvg | sed -E '/^<!--|^ -->|^<title>|> <\/text>$$/d; s/&#45;/-/g; s/ text-anchor="start"//; s/ font-family="monospace" font-size="10.00"//; s/^<svg /<svg font-family="monospace" font-size="10" /' \
	  > docs/reference/filegraph.svg

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16
