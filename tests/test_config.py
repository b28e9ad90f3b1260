"""Bad input is refused before any job, in words that name the key, the file or the cell and what would be accepted; defaults; what only jobs see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from in_process import Done, run_script
from quantgrid import config as configs
from quantgrid.errors import ConfigError
from quantgrid.pipeline import Plan
from quantgrid.provenance import canonical
from workflow import Checkout

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "data" / "tiny-llama"
SHAPE = {"architecture": "LlamaForCausalLM", "hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
         "vocabulary": 49152}
Edit = Callable[[dict[str, Any]], Any]


def valid(**changes: Any) -> dict[str, Any]:
    """A config without a mistake, as YAML gives it, with top-level keys changed."""
    study = {"models": ["tiny"], "transforms": ["none", "smooth"], "mitigations": ["rtn", "lr8"], "granularities": ["channel"], "formats": ["int4"]}
    return {
        "models": {"tiny": {"source": "local", "path": str(TINY)}, "hub": {"source": "hub", "id": "a/b", "revision": "main", "shape": dict(SHAPE)}},
        "corpora": {"docs": {"source": "builtin", "part": "evaluation", "window": 64},
                    "other": {"source": "builtin", "part": "evaluation", "window": 32},
                    "text": {"source": "builtin", "part": "calibration", "window": 64}},
        "calibrations": {"default": {"corpus": "text"}},
        "transforms": {"smooth": {"method": "scaling", "alpha": 0.5}, "rotation": {"method": "random_hadamard", "seeds": [0, 1]}},
        "mitigations": {"lr8": {"method": "low_rank", "rank": 8}, "solved": {"method": "gptq"}},
        "formats": {"int4-mse": {"preset": "int4", "weight": {"range": "mse"}}},
        "tasks": {"cloze": {"source": "builtin", "kind": "cloze", "items": 8}},
        "evaluate": {"perplexity": ["docs"]}, "studies": {"s": study}, **changes,
    }


def refusal(edit: Edit) -> str:
    """The message with which the config is refused after an edit of it."""
    content = valid()
    edit(content)
    with pytest.raises(ConfigError) as caught:
        configs.check(content)
    return str(caught.value)


def study(**changes: Any) -> Edit:
    return lambda config: config["studies"]["s"].update(changes)


def entry(group: str, name: str, content: Any) -> Edit:
    """``content`` as the entry ``group.name``."""
    return lambda config: config.setdefault(group, {}).update({name: content})


def changed(group: str, name: str, **changes: Any) -> Edit:
    return lambda config: config[group][name].update(changes)


def test_the_config_that_the_mistakes_are_made_in_is_valid():
    assert len(Plan(configs.check(valid())).all_evaluations()) == 2 * 5  # errors and perplexity of four quantized cells and the baseline


BAD: dict[str, tuple[Edit, list[str]]] = {
    # keys, at every level
    "top-level key": (lambda c: c.update(study={}),
        ["config: unknown key 'study' - did you mean 'studies'? Accepted: calibrations, compute, corpora"]),
    "key of compute": (lambda c: c.update(compute={"dtypes": "float32"}),
        ["compute: unknown key 'dtypes' - did you mean 'dtype'? Accepted: device, dtype"]),
    "key of a model": (changed("models", "tiny", pathh="x"), ["models.tiny: unknown key 'pathh' - did you mean 'path'? Accepted: file, id"]),
    "key of a model's shape": (lambda c: c["models"]["hub"]["shape"].update(headz=9),
        ["models.hub.shape: unknown key 'headz' - did you mean 'heads'?"]),
    "key of a corpus": (changed("corpora", "docs", windw=3), ["corpora.docs: unknown key 'windw' - did you mean 'window'? Accepted: add_bos"]),
    "key of a calibration": (changed("calibrations", "default", sample=9), ["calibrations.default: unknown key 'sample' - did you mean 'samples'?"]),
    "calibration that leaves nothing": (changed("calibrations", "default", skip_first=64),
        ["calibrations.default.skip_first: 64 leaves nothing of the windows of 'text', 64 tokens each"]),
    "tokens left out of a training": (lambda c: (changed("calibrations", "default", skip_first=1)(c), study(transforms=["none", "flatquant"])(c)),
        ["transforms.flatquant.calibration: 'flatquant' is trained on all tokens of its windows, and calibration 'default' leaves the first ones"]),
    "tokens left out of a mitigation's training": (lambda c: (changed("calibrations", "default", skip_first=1)(c), study(mitigations=["qat"])(c)),
        ["mitigations.qat.calibration: 'qat' is trained on all tokens"]),
    "key of a format": (changed("formats", "int4-mse", weights={}), ["formats.int4-mse: unknown key 'weights' - did you mean 'weight'?"]),
    "key of a scheme": (entry("formats", "x", {"preset": "int4", "weight": {"rang": "mse"}}),
        ["formats.x.weight: unknown field", "mean 'range'? Accepted: clip"]),
    "key of a task": (changed("tasks", "cloze", item=3), ["tasks.cloze: unknown key 'item' - did you mean 'items'?"]),
    "key of evaluate": (lambda c: c["evaluate"].update(perplexities=["docs"]), ["evaluate: unknown key 'perplexities' - did you mean 'perplexity'?"]),
    "key of evaluation": (lambda c: c.update(evaluation={"batchsize": 3}), ["evaluation: unknown key 'batchsize' - did you mean 'batch_size'?"]),
    "key of a study": (study(model=["tiny"]), ["studies.s: unknown key 'model' - did you mean 'models'? Accepted: also"]),
    "key of also": (study(also=[{"format": ["int8"]}]), ["studies.s.also.0: unknown key 'format' - did you mean 'formats'?"]),
    "key of exclude": (study(exclude=[{"formats": "int8"}]), ["studies.s.exclude.0: unknown key 'formats' - did you mean 'format'?"]),
    "key of a table": (study(table={"row": ["model"]}), ["studies.s.table: unknown key 'row' - did you mean 'rows'?"]),
    "key of a figure": (study(figure={"color": "model"}), ["studies.s.figure: unknown key 'color'", "Accepted: dataset, facet, hue, kind"]),
    "option of a method": (changed("transforms", "smooth", alfa=0.3),
        ["transforms.smooth: unknown option 'alfa' - did you mean 'alpha'? Accepted: alpha, points, round_activations, search, sites, statistic"]),
    "option of a method without options": (entry("transforms", "r", {"method": "fold_norms", "alpha": 0.5}),
        ["transforms.r: unknown option 'alpha'", "(none)"]),
    # names
    "model of a study": (study(models=["tyny"]), ["studies.s.models: unknown model 'tyny' - did you mean 'tiny'? Accepted: hub, tiny"]),
    "transform of a study": (study(transforms=["smoth"]), ["studies.s.transforms: unknown transform 'smoth' - did you mean 'smooth'?"]),
    "mitigation of a study": (study(mitigations=["lr9"]), ["studies.s.mitigations: unknown mitigation 'lr9' - did you mean 'lr8'?"]),
    "granularity of a study": (study(granularities=["group64"]),
        ["studies.s.granularities: unknown granularity 'group64'. Accepted: tensor, channel, group-N"]),
    "format of a study": (study(formats=["int44"]), ["studies.s.formats: unknown format 'int44' - did you mean 'int4'? Accepted: bf16"]),
    "name under also": (study(also=[{"formats": ["int8"]}, {"formats": ["nvpf4"]}]),
        ["studies.s.also.1.formats: unknown format 'nvpf4' - did you mean 'nvfp4'?"]),
    "name under exclude": (study(exclude=[{"format": ["int8", "int44"]}]),
        ["studies.s.exclude.0.format: unknown format 'int44' - did you mean 'int4'?"]),
    "corpus of evaluate": (lambda c: c.update(evaluate={"perplexity": ["dcs"]}),
        ["evaluate.perplexity: unknown corpus 'dcs' - did you mean 'docs'? Accepted: docs, other, text"]),
    "corpus of a study": (study(evaluate={"perplexity": ["dcs"]}), ["studies.s.evaluate.perplexity: unknown corpus 'dcs'"]),
    "task of a study": (study(evaluate={"tasks": ["clozes"]}), ["studies.s.evaluate.tasks: unknown task 'clozes' - did you mean 'cloze'?"]),
    "corpus of a calibration": (changed("calibrations", "default", corpus="txt"),
        ["calibrations.default.corpus: unknown corpus 'txt' - did you mean 'text'?"]),
    "calibration of a method": (changed("mitigations", "lr8", calibration="defalt"),
        ["mitigations.lr8.calibration: unknown calibration 'defalt'", "'default'"]),
    "no default calibration": (lambda c: c.update(calibrations={"mine": {"corpus": "text"}}), ["calibrations: the key 'default' is missing"]),
    "method of a transform": (changed("transforms", "smooth", method="scalling"),
        ["transforms.smooth.method: unknown method 'scalling' - did you mean 'scaling'? Accepted: "]),
    "method of a mitigation": (changed("mitigations", "lr8", method="gptqq"),
        ["mitigations.lr8.method: unknown method 'gptqq' - did you mean 'gptq'?"]),
    "preset of a format": (changed("formats", "int4-mse", preset="int9"), ["formats.int4-mse.preset: unknown preset 'int9'", "Accepted: bf16"]),
    "element of a scheme": (entry("formats", "x", {"preset": "fp4", "activation": {"element": "e2m2"}}),
        ["formats.x.activation: unknown element 'e2m2'", "e2m1"]),
    "metric of a table": (study(table={"metrics": ["perplexty"]}),
        ["studies.s.table.metrics.0: 'perplexty' is not accepted - did you mean 'perplexity'?"]),
    "metric of a figure": (study(figure={"metric": "bits"}), ["studies.s.figure.metric: 'bits' is not accepted. Accepted: perplexity, negative_log"]),
    "axis of a table": (study(table={"rows": ["formats"]}),
        ["studies.s.table.rows.0: 'formats' is not accepted - did you mean 'format'? Accepted: model, transform"]),
    "axis of a figure": (study(figure={"x": "group"}), ["studies.s.figure.x: 'group' is not accepted. Accepted: model, transform"]),
    "kind of a figure": (study(figure={"kind": "dot"}),
        ["studies.s.figure.kind: 'dot' is not accepted - did you mean 'dots'? Accepted: dots, bars, lines, heatmap"]),
    "dataset of a table": (study(table={"datasets": ["dosc"]}),
        ["studies.s.table.datasets: unknown dataset 'dosc' - did you mean 'docs'? Accepted: docs"]),
    "dataset of a figure": (study(figure={"dataset": "text"}), ["studies.s.figure.dataset: unknown dataset 'text'", "Accepted: docs"]),
    "source of a model": (entry("models", "w", {"source": "wheels"}),
        ["models.w.source: 'wheels' is not accepted - did you mean 'wheel'? Accepted: wheel, local, builtin, hub"]),
    "device": (lambda c: c.update(compute={"device": "gpu"}), ["compute.device: 'gpu' is not accepted", "Accepted: auto, cpu, cuda"]),
    # types and ranges
    "text for a number": (lambda c: c.update(seed="7"), ["seed: '7' is of the wrong type; expected integer"]),
    "truth for a number": (lambda c: c.update(threads=True), ["threads: True is of the wrong type; expected integer"]),
    "number below its range": (lambda c: c.update(threads=0), ["threads: 0 is less than the minimum of 1"]),
    "threads of a rule": (lambda c: c.update(threads={"calibrate": 2}), ["threads: unknown key 'calibrate' - did you mean 'calibrate_model'?"]),
    "too few threads of a rule": (lambda c: c.update(threads={"default": 0}), ["threads.default: 0 is less than the minimum of 1"]),
    "name for a list": (study(formats="int4"), ["studies.s.formats: 'int4' is of the wrong type; expected array"]),
    "nothing for a mapping": (lambda c: c.update(corpora=None), ["corpora: None is of the wrong type; expected object"]),
    "nothing for a study": (entry("studies", "t", None), ["studies.t: None is of the wrong type; expected object"]),
    "mapping for a name": (study(exclude=[{"format": [{}]}]), ["studies.s.exclude.0.format.0: {} is of the wrong type; expected string"]),
    "list for a field": (entry("formats", "x", {"preset": "int4", "weight": {"element": ["int4"]}}),
        ["formats.x.weight.element: ['int4'] is of the wrong type"]),
    "option out of range": (changed("transforms", "smooth", alpha=1.5),
        ["transforms.smooth.alpha: 1.5 is out of range; expected a number >= 0.0 <= 1.0"]),
    "option below its range": (changed("mitigations", "lr8", rank=-1), ["mitigations.lr8.rank: -1 is out of range; expected a whole number >= 0"]),
    "option that is no number": (changed("transforms", "smooth", alpha=float("nan")), ["transforms.smooth.alpha: nan is out of range"]),
    "infinite option": (changed("mitigations", "solved", damping=float("inf")), ["mitigations.solved.damping: inf is out of range"]),
    "fraction for a whole number": (changed("mitigations", "lr8", rank=8.5),
        ["mitigations.lr8.rank: 8.5 is not accepted; expected a whole number >= 0 or a share between 0 and 1"]),
    "text for a truth": (changed("mitigations", "solved", activation_order="yes"),
        ["mitigations.solved.activation_order: 'yes' is not accepted; expected true or false"]),
    "choice of an option": (changed("mitigations", "lr8", metric="plane"),
        ["mitigations.lr8.metric: 'plane' is not accepted; expected one of plain, lqer, qera_approx, qera_exact"]),
    "share of more than all": (changed("mitigations", "lr8", rank=1.5),
        ["mitigations.lr8.rank: 1.5 is not accepted; expected a whole number >= 0 or a share between 0 and 1"]),
    "GPTAQ from cached statistics": (entry("mitigations", "x", {"method": "gptaq", "propagation": "cached"}),
        ["mitigations.x.propagation: 'cached' is not accepted; expected one of sequential"]),
    "GPTAQ as a base from cached statistics": (entry("mitigations", "x", {"method": "gptq_low_rank", "base": "gptaq"}),
        ["mitigations.x.base: 'gptaq' has no meaning with propagation 'cached'; set propagation to 'sequential', or leave it out"]),
    "rounded activations without a forward pass": (entry("mitigations", "x", {"method": "gptq", "quantized_activations": True}),
        ["mitigations.x.quantized_activations: True has no meaning with propagation 'cached'; set propagation to 'sequential'"]),
    "running scales in activation order": (entry("mitigations", "x", {"method": "gptq", "scales": "running", "activation_order": True}),
        ["mitigations.x.activation_order: True has no meaning with scales 'running'; set scales to 'static'"]),
    "order of a base that has its own": (entry("mitigations", "x", {"method": "gptq_low_rank", "base": "mr_gptq", "activation_order": False}),
        ["mitigations.x.activation_order: False has no meaning with base 'mr_gptq'; set base to 'gptq' or 'gptaq'"]),
    "damping of a base without one": (entry("mitigations", "x", {"method": "low_rank_first", "damping": 0.1}),
        ["mitigations.x.damping: 0.1 has no meaning with base 'rtn'; set base to 'gptq' or 'mr_gptq' or 'gptaq'"]),
    "propagation of what reads no statistics": (entry("mitigations", "x", {"method": "rtn", "propagation": "sequential"}),
        ["mitigations.x: unknown option 'propagation'"]),
    "metric that has no diagonal": (entry("mitigations", "x", {"method": "sparse_outliers", "metric": "qera_exact"}),
        ["mitigations.x.metric: 'qera_exact' is not accepted; expected one of plain, lqer, qera_approx"]),
    "site of an option": (changed("transforms", "smooth", sites=["attention"]),
        ["transforms.smooth.sites: ['attention'] is not accepted; expected a list of attention_input"]),
    "scheme out of range": (entry("formats", "x", {"preset": "int4", "weight": {"clip_ratio": 2}}),
        ["formats.x.weight: clip_ratio is 2: a number above 0 and at most 1"]),
    "name given twice": (study(formats=["int4", "int4"]), ["studies.s.formats: ['int4', 'int4'] has non-unique elements"]),
    # names that make no path, or that stand for something else
    "slash in a model's name": (entry("models", "a/b", {"source": "local", "path": str(TINY)}),
        ["models: 'a/b' is not accepted as a name; expected a text of letters"]),
    "name that is a number": (entry("formats", 4, {"preset": "int4"}), ["formats: 4 is not accepted as a name", "in quotes"]),
    "dots for a name": (entry("studies", "..", {}), ["studies: '..' is not accepted as a name"]),
    "name of another method": (entry("mitigations", "rtn", {"method": "gptq"}),
        ["mitigations.rtn: 'rtn' is the name of a built-in method; rename this entry"]),
    "none that transforms": (entry("transforms", "none", {"method": "scaling"}),
        ["transforms.none: 'none' is the name of a built-in method"]),
    "name of another preset": (entry("formats", "int4", {"preset": "int8"}), ["formats.int4: 'int4' is the name of a built-in preset"]),
    "name of a seeded entry": (entry("transforms", "rotation-s1", {"method": "scaling"}),
        ["transforms.rotation.seeds: the name 'rotation-s1' has an entry of its own"]),
    # what contradicts itself
    "seed without chance": (changed("mitigations", "lr8", seed=3),
        ["mitigations.lr8: method 'low_rank' draws nothing at random", "neither 'seed' nor 'seeds'"]),
    "seeds without chance": (changed("transforms", "smooth", seeds=[3]), ["transforms.smooth: method 'scaling' draws nothing at random"]),
    "seed and seeds": (changed("transforms", "rotation", seed=3), ["transforms.rotation: 'seed' and 'seeds' contradict each other"]),
    "group size that does not divide": (study(granularities=["group-128"], models=["hub"]), [
        "studies.s: granularity 'group-128' does not divide the 576 inputs of site 'attention_input' of model 'hub'", "16, 32, 48, 64, 96, 192"]),
    "block format at another granularity": (study(formats=["nvfp4"], granularities=["group-32"]), [
        "studies.s: format 'nvfp4' has blocks of 16 by definition, so granularity 'group-32' contradicts it; use 'group-16' or 'native'"]),
    "block format with other blocks": (entry("formats", "x", {"preset": "mxfp4", "weight": {"group_size": 16}}), [
        "formats.x.weight: preset 'mxfp4' has blocks of 32 by definition", "int4 or fp4"]),
    "two group sizes of a format": (entry("formats", "x", {"preset": "int4", "weight": {"granularity": "group-16", "group_size": 32}}),
        ["formats.x.weight: granularity 'group-16' contradicts group_size 32"]),
    "asymmetric float": (entry("formats", "x", {"preset": "fp4", "weight": {"symmetric": False}}),
        ["formats.x.weight: element 'e2m1' is a signed float or a codebook"]),
    "activations that are not rounded": (entry("formats", "x", {"preset": "w4a16", "activation": {"element": "int8"}}), [
        "formats.x.activation: preset 'w4a16' leaves activations in full precision"]),
    "format that rounds nothing": (entry("formats", "x", {"preset": "int4", "weight": None, "activation": None}),
        ["formats.x: rounds neither", "'bf16'"]),
    "bf16 as an entry": (entry("formats", "bf16", {"preset": "bf16"}), ["formats.bf16: rounds neither weights nor activations"]),
    "quantized without a mitigation": (study(mitigations=["none"]),
        ["studies.s: mitigation 'none' with format 'int4'; a quantized format takes one of "]),
    "rotation without its matrix": (lambda c: (c["models"]["hub"]["shape"].update(head_dim=92), study(models=["hub"], transforms=["rotation"])(c)), [
        "studies.s: transform 'rotation-s0' needs a Hadamard matrix of order 92 (head_dim of model 'hub')"]),
    "empty study": (study(exclude=[{"model": "tiny"}]), ["studies.s: no cell is left; give each of models, transforms"]),
    "study without an axis": (lambda c: c["studies"]["s"].pop("formats"), ["studies.s: no cell is left", "formats at least one value"]),
    "no study": (lambda c: c.update(studies={}), ["studies: {} should be non-empty"]),
    "nothing evaluated": (lambda c: c.pop("evaluate"),
        ["studies.s: nothing is evaluated; name a corpus in evaluate.perplexity or a task in evaluate.tasks"]),
    "nothing evaluated in one study": (study(evaluate={"perplexity": []}), ["studies.s: nothing is evaluated"]),
    "metric that is not measured": (study(table={"metrics": ["accuracy"]}),
        ["studies.s.table: metric 'accuracy' is not measured in this study; name a task in evaluate.tasks"]),
    "dataset of another metric": (study(evaluate={"tasks": ["cloze"]}, table={"datasets": ["cloze"]}), [
        "studies.s.table.datasets: metric 'perplexity' is measured on none of cloze. Accepted: docs"]),
    "figure of two datasets": (lambda c: c["evaluate"].update(perplexity=["docs", "other"]),
        ["studies.s.figure.dataset: metric 'perplexity' is measured on several; name one of docs, other"]),
    "axis twice in a table": (study(table={"rows": ["format"], "columns": ["format"]}),
        ["studies.s.table: axis 'format' is named twice", "rows or columns"]),
    "axis twice in a figure": (study(figure={"x": "format", "hue": "format"}), ["studies.s.figure: axis 'format' is named twice"]),
    # what the report shows
    "distribution of an unknown transform": (lambda c: c.update(report={"distributions": ["smoth"]}), [
        "report.distributions: unknown transform 'smoth' - did you mean 'smooth'?", "none", "rotation"]),
    "distribution of a transform without a cell": (lambda c: c.update(report={"distributions": ["smooth", "rotation"]}), [
        "report.distributions: no study has the transform 'rotation-s0'; add it to one, or leave it out here"]),
    "distributions that are no list": (lambda c: c.update(report={"distributions": "smooth"}), [
        "report.distributions: 'smooth' is of the wrong type; expected array"]),
    # what a source needs
    "wheel without its file": (entry("models", "w", {"source": "wheel", "package": "a==1"}),
        ["models.w: the keys 'file', 'sha256', 'shape' are missing"]),
    "wheel without a version": (entry("models", "w", {"source": "wheel", "package": "a", "file": "f.gguf", "sha256": "0" * 64, "shape": SHAPE}), [
        "models.w.package: 'a' is not accepted; expected name==version"]),
    "checksum that is none": (entry("models", "w", {"source": "wheel", "package": "a==1", "file": "f.gguf", "sha256": "0" * 63, "shape": SHAPE}), [
        "models.w.sha256:", "expected 64 hexadecimal digits"]),
    "hub model without a revision": (lambda c: c["models"]["hub"].pop("revision"), ["models.hub: the key 'revision' is missing"]),
    "hub model with half a shape": (lambda c: c["models"]["hub"]["shape"].pop("layers"), ["models.hub.shape: the keys layers are missing"]),
    "hub model of experts": (lambda c: c["models"]["hub"]["shape"].update(architecture="MixtralForCausalLM"), [
        "models.hub.shape.architecture: MixtralForCausalLM is a mixture of experts", "LlamaForCausalLM"]),
    "local model without a path": (lambda c: c["models"]["tiny"].pop("path"), ["models.tiny: the key 'path' is missing"]),
    "builtin corpus without a part": (lambda c: c["corpora"]["docs"].pop("part"), ["corpora.docs: the key 'part' is missing"]),
    "hub corpus without a split": (entry("corpora", "x", {"source": "hub", "id": "a/b", "window": 64}), ["corpora.x: the key 'split' is missing"]),
    "task without its name": (entry("tasks", "x", {"source": "lm_eval"}), ["tasks.x: the key 'task' is missing"]),
    "corpus file that is not there": (entry("corpora", "x", {"source": "local", "path": "/none.txt", "window": 8}),
        ["corpora.x.path: /none.txt: no such file"]),
    "task file that is not there": (entry("tasks", "x", {"source": "local", "path": "~/none.jsonl"}), ["tasks.x.path: ~/none.jsonl: no such file"]),
    "model folder that is not there": (changed("models", "tiny", path="/none"),
        ["models.tiny.path: /none: no such folder; a model folder holds config.json"]),
    "model of another shape": (changed("models", "tiny", shape={"layers": 4}),
        ["models.tiny.shape: the model is another one: layers is 3, declared 4"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_refused_by_name_with_what_is_accepted(mistake):
    edit, expected = BAD[mistake]
    message = refusal(edit)
    assert message.startswith(expected[0]), message
    assert all(part in message for part in expected) and "\n" not in message, message


def test_bad_input_covers_more_cases_than_asked_for():
    assert len(BAD) >= 20


def test_every_mistake_is_named_in_one_message():
    def edit(config: dict[str, Any]) -> None:
        config["transforms"]["smooth"]["alpha"] = 2
        config["formats"]["int4-mse"]["preset"] = "int9"
        config["evaluate"]["perplexity"] = ["dcs"]
        config["studies"]["s"].update(mitigations=["lr9", "rtn", "gptqq"], models=["tyny"])
        config["studies"]["t"] = {"formats": ["int44"]}

    first, *lines = refusal(edit).splitlines()
    assert first == "7 mistakes in the config:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "transforms.smooth.alpha", "formats.int4-mse.preset", "studies.s.models", "studies.s.mitigations", "studies.s.mitigations",
        "studies.t.formats", "evaluate.perplexity"]
    first, *lines = refusal(lambda config: (config.update(sead=1, seed="x"), config["corpora"]["docs"].update(windw=1))).splitlines()
    assert first == "3 mistakes in the config:" and [line.split(":")[0] for line in lines] == ["  config", "  corpora.docs", "  seed"]
    first, *lines = refusal(lambda config: config["studies"].update(t={}, u={**config["studies"]["s"], "formats": ["mxfp4"]})).splitlines()
    assert first == "2 mistakes in the config:" and "studies.t: no cell" in lines[0] and "studies.u: format 'mxfp4'" in lines[1]


@pytest.mark.parametrize("content", [None, [], "models", 3])
def test_what_is_no_mapping_is_refused(content):
    with pytest.raises(ConfigError, match="not a mapping; it holds the keys models, corpora, calibrations, studies"):
        configs.check(content)


def test_an_empty_config_is_told_what_it_needs():
    with pytest.raises(ConfigError, match="config: the keys 'models', 'corpora', 'calibrations', 'studies' are missing"):
        configs.check({})


@pytest.mark.parametrize(("text", "message"), [("seed: [", "not a readable YAML file"), ("- a\n- b", "not a mapping"), ("", "not a mapping"),
                                               (None, "not a readable YAML file .*No such file")])
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{message}") as caught:
        configs.load(path)
    assert "\n" not in str(caught.value)


# -- folders ------------------------------------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file; a model folder holds config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a JSON file"),
    (lambda folder: (folder / "model.safetensors").unlink(), "models.tiny.path: .*holds no weights; expected model.safetensors"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "models.tiny.path: .*only pickled weights.*save_pretrained"),
    (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors: not a whole safetensors file"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "models.tiny.path: .*holds no tokenizer; one of tokenizer.json"),
    (lambda folder: edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"]), "unknown architecture 'GPT2LMHeadModel'; supported: Llama"),
    (lambda folder: edit_json(folder / "config.json", architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM is a mixture of experts"),
    (lambda folder: edit_json(folder / "config.json", num_local_experts=8), "is a mixture of experts"),
])
def test_a_spoilt_model_folder_is_refused_before_any_job(tmp_path, spoil, message):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        configs.check(valid(models={"tiny": {"source": "local", "path": str(folder)}}))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for results in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        message = refusal(lambda config, results=results: config.update(results_dir=str(results)))
        assert message == f"results_dir: '{results}' cannot be written ({tmp_path / 'file'} is not a writable folder)"
    assert configs.check(valid(results_dir=str(tmp_path / "not" / "there")))


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text")
    content = valid(models={"tiny": {"source": "local", "path": "~/model"}})
    content["corpora"]["docs"] = {"source": "local", "path": "~/text.txt", "window": 2}
    assert len(Plan(configs.check(content)).all_evaluations()) == 2 * 5


# -- defaults -----------------------------------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in_and_the_content_stays_as_it_was():
    content = valid()
    before = json.dumps(content)
    checked = configs.check(content)
    assert json.dumps(content) == before and configs.check(content) == checked
    assert (checked["results_dir"], checked["seed"], checked["threads"], checked["keep_checkpoints"]) == ("results", 0, {"default": 1}, False)
    assert checked["compute"] == {"device": "auto", "dtype": "auto"}
    assert checked["evaluation"] == {"batch_size": 8, "task_limit": None, "depth_windows": 4}
    assert checked["calibrations"]["default"] == {"corpus": "text", "samples": 256, "skip_first": 0}
    assert checked["evaluate"] == {"perplexity": ["docs"], "tasks": [], "depth": []}
    assert checked["report"] == {"title": "quantgrid", "distributions": []}
    assert checked["studies"]["s"]["table"] == {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]}
    assert checked["studies"]["s"]["figure"] == {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "perplexity", "scale": "log"}


@pytest.mark.parametrize(("figure", "x", "hue"), [({"x": "transform"}, "transform", None), ({"hue": "mitigation"}, "transform", "mitigation"),
                                                  ({"x": "format"}, "format", "transform"), ({"facet": "transform"}, "mitigation", None),
                                                  ({"x": "mitigation", "hue": "transform", "facet": "format"}, "mitigation", "transform"),
                                                  ({"x": "format", "hue": "mitigation", "facet": "transform"}, "format", "mitigation")])
def test_defaults_of_a_figure_make_room_for_what_a_study_places(figure, x, hue):
    found = configs.check(valid(studies={"s": {**valid()["studies"]["s"], "figure": figure}}))["studies"]["s"]["figure"]
    assert (found["x"], found.get("hue")) == (x, hue) and figure.items() <= found.items()


def test_defaults_of_a_table_make_room_for_what_a_study_places():
    found = configs.check(valid(studies={"s": {**valid()["studies"]["s"], "table": {"rows": ["mitigation"]}}}))["studies"]["s"]["table"]
    assert (found["rows"], found["columns"]) == (["mitigation"], [])


# -- what only a job can know, and the workflow -------------------------------------------------------------------------------------------


def assert_refused(done: Done, *parts: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and all(part in lines[0] for part in parts), done.stderr


def test_a_corpus_too_short_is_refused_by_its_job(tmp_path):
    (tmp_path / "short.txt").write_text("A few words, and then no more.")
    content = valid()
    content["corpora"]["docs"] = {"source": "local", "path": str(tmp_path / "short.txt"), "window": 64, "windows": 3}
    step = Plan(configs.check(content)).tokenize_corpus("tiny", "docs")
    done = run_script("tokenize_corpus", "--spec", canonical(step.spec), "--model", str(TINY), "--windows", str(tmp_path / "out.safetensors"))
    assert_refused(done, "tokenize_corpus: corpora.docs: its", "tokens make 0 windows of 64, 3 are asked for; set windows to at most 0")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checksum_that_does_not_match_is_refused_by_its_job(tmp_path):
    content = valid(models={"tiny": {"source": "local", "path": str(TINY), "sha256": "0" * 64}})
    step = Plan(configs.check(content)).fetch_model("tiny")
    done = run_script("fetch_model", "--spec", canonical(step.spec), "--folder", str(tmp_path / "out"))
    assert_refused(done, "fetch_model: models.tiny.sha256: the weights in", f"the config says {'0' * 64}; correct the one that is wrong")
    assert not list(tmp_path.iterdir())


def test_the_workflow_prints_the_message_and_no_traceback(tmp_path):
    checkout = Checkout.make(tmp_path / "quantgrid")
    content = checkout.config("smoke")
    content["transforms"]["smoothquant"]["alfa"] = content["transforms"]["smoothquant"].pop("alpha")
    (checkout.folder / "bad.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run([sys.executable, "-m", "snakemake", "-n", "--configfile", "bad.yaml"], cwd=checkout.folder, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip().splitlines()
    accepted = "alpha, points, round_activations, search, sites, statistic"
    assert done.returncode == 1
    assert output == [f"quantgrid: transforms.smoothquant: unknown option 'alfa' - did you mean 'alpha'? Accepted: {accepted}"]
    assert not (checkout.folder / content["results_dir"]).exists()
    (checkout.folder / "bad.yaml").write_text("models: [")
    done = run_script("run_workflow", "--configfile", "bad.yaml", folder=checkout.folder)
    assert_refused(done, "quantgrid: bad.yaml: not a readable YAML file")


# -- sets of tasks ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("paper", 9), ("spinquant8", 8), ("ostquant9", 9), ("offline", 2)])
def test_a_set_stands_for_its_tasks(name, count):
    found = configs.check(valid(evaluate={"perplexity": ["docs"], "tasks": [name]}))
    assert len(found["evaluate"]["tasks"]) == count and set(found["evaluate"]["tasks"]) <= set(found["tasks"])
    assert all(entry["source"] == ("builtin" if name == "offline" else "lm_eval") for task, entry in found["tasks"].items() if task != "cloze")


def test_a_set_beside_single_tasks_and_own_entries():
    content = valid(evaluate={"perplexity": ["docs"], "tasks": ["cloze", "offline"]})
    found = configs.check(content)
    assert found["evaluate"]["tasks"] == ["cloze", "continuation"] and found["tasks"]["cloze"]["items"] == 8  # the config's own cloze
    content["tasks"]["offline"] = {"source": "builtin", "kind": "cloze", "items": 4}
    assert configs.check(content)["evaluate"]["tasks"] == ["cloze", "offline"]
    content["evaluate"]["tasks"] = ["spinqant8"]
    with pytest.raises(ConfigError, match=r"evaluate\.tasks: unknown task 'spinqant8' - did you mean 'spinquant8'"):
        configs.check(content)


@pytest.mark.slow
def test_names_of_sets_are_tasks_of_lm_eval():
    from lm_eval.tasks import TaskManager

    from quantgrid.task_presets import TASK_PRESETS

    used = {entry["task"] for tasks in TASK_PRESETS.values() for entry in tasks.values() if entry["source"] == "lm_eval"}
    assert used <= set(TaskManager().all_tasks)
