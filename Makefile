# quantgrid: `make run` and `make test` are all a newcomer needs; both make their own environment from pinned versions.
# Variables: CONFIG (a config file), CORES, STUDY (a study's name), BENCH (benchmarks), ARGS (further options of what is run), PYTHON.

PYTHON ?= python3
CONFIG ?= config/config.yaml
CORES ?= all
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
BENCH ?= fake_quantize low_rank online_rotation sequential gptq
WORKFLOW = $(BIN)/python scripts/run_workflow.py --configfile $(CONFIG) --cores $(CORES)

.PHONY: run test bench smoke dry-run table figure docs lint help

run: $(VENV)/.installed  ## the workflow of CONFIG, from models to report
	$(WORKFLOW) $(ARGS)

dry-run: $(VENV)/.installed  ## what a run would do, job by job counted
	$(WORKFLOW) --dry-run --quiet rules host $(ARGS)

smoke: $(VENV)/.installed  ## every method and format once on a tiny model, in minutes
	$(BIN)/python scripts/run_workflow.py --configfile config/smoke.yaml --cores $(CORES) $(ARGS)

table: $(VENV)/.installed  ## one table and what it needs: make table STUDY=formats
	$(WORKFLOW) --table $(STUDY) $(ARGS)

figure: $(VENV)/.installed  ## one figure and what it needs: make figure STUDY=formats
	$(WORKFLOW) --figure $(STUDY) $(ARGS)

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed-dev $(if $(filter gptq,$(BENCH)),$(PEERS)/.installed)  ## speed and memory, into results/benchmarks.csv and .md: all, or BENCH="gptq sequential"
	$(foreach part,$(BENCH),$(BIN)/python tests/benchmarks/$(part).py $(ARGS) &&) true

lint: $(VENV)/.installed-dev  ## ruff, snakefmt, snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

$(VENV)/.installed: envs/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantgrid needs Python 3.11 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed envs/requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/requirements-dev.txt
	@touch $@

$(PEERS)/.installed: envs/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r envs/requirements-peers.txt
	@touch $@

docs: $(VENV)/.installed  ## the results of the default run into README.md and docs/
	$(BIN)/python docs/update.py

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
