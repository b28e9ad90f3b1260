"""Reruns after an edit: every line of the table in docs/how-to/edits.md, by a dry run over a fully
computed folder."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from checkouts import ROOT, Checkout

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
Plan = dict[str, set[str]]
METHODS = [
    (transform, mitigation) for transform in ("none", "smoothquant") for mitigation in ("rtn", "gptq", "low-rank")
]
QUANTIZED = {f"{transform}/{mitigation}/int4" for transform, mitigation in METHODS} | {"none/rtn/fp4"}
# those of the study of formats, which measures the residual error
DEEP = {"none/rtn/int4", "none/rtn/fp4"}
FULL = "none/none/bf16"
LIBRARY = "scripts/quantgrid"


def edits_config(config: dict[str, Any]) -> dict[str, Any]:
    """Seven quantized cells in three studies, every checkpoint kept."""
    common = {
        "models": ["reference-1m-planted"],
        "transforms": ["none"],
        "mitigations": ["rtn"],
        "granularities": ["channel"],
        "formats": ["int4"],
    }
    table = {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity", "kl_divergence"]}
    figure = {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "perplexity", "scale": "log"}
    config["corpora"]["other"] = {**config["corpora"]["docs-calibration"], "windows": 16}
    config["transforms"] = {"none": {"method": "none"}, "smoothquant": {"method": "scaling", "alpha": 0.5}}
    config["mitigations"] = {
        "rtn": {"method": "rtn"},
        "gptq": {"method": "gptq", "damping": 0.01},
        "low-rank": {"method": "low_rank", "rank": 8},
    }
    config |= {
        "formats": {},
        "results_dir": "results-edits",
        "keep_checkpoints": True,
        "report": {"distributions": ["smoothquant"]},
    }
    config["studies"] = {
        "methods": {
            **common,
            "transforms": ["none", "smoothquant"],
            "mitigations": ["rtn", "gptq", "low-rank"],
            "table": table,
            "figure": figure,
        },
        "formats": {
            **common,
            "formats": ["int4", "fp4"],
            "evaluate": {"residual_error": ["docs"]},
            "table": {**table, "rows": ["format"]},
            "figure": {**figure, "x": "format"},
        },
        "tasks": {
            **common,
            "evaluate": {"perplexity": [], "tasks": ["cloze"]},
            "table": {**table, "metrics": ["accuracy"]},
            "figure": {**figure, "metric": "accuracy", "dataset": "cloze", "scale": "linear"},
        },
    }
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("edits") / "quantgrid")
    checkout.write_config(edits_config(checkout.config()), "edits")
    checkout.pretend("edits")
    return checkout


def planned(checkout: Checkout, name: str = "edited", *options: str) -> Plan:
    """Rule -> what its jobs are called: a cell without model and granularity, a study, or the last
    axis of a step."""
    found: Plan = {}
    for rule, axes in checkout.planned(name, *options):
        if "format" in axes:
            label = "/".join(axes[axis] for axis in ("transform", "mitigation", "format"))
        else:
            label = next(
                (axes[axis] for axis in ("study", "corpus", "calibration", "transform", "model") if axis in axes), ""
            )
        found.setdefault(rule, set()).add(label)
    found.pop("all", None)
    return found


def shown(*names: str) -> Plan:
    """Tables and figures of these studies, and what is made from them."""
    return {
        **{rule: set(names) for rule in ("collect_study", "tabulate_study", "plot_study")},
        **{rule: {""} for rule in ("collect_results", "evaluate_claims", "plot_pareto", "build_report")},
    }


def studies(*names: str) -> Plan:
    """Jobs that follow new evaluations in these studies."""
    return {**shown(*names), "list_steps": {""}}


def cells(labels: set[str], *names: str, tasks: bool = False) -> Plan:
    """Cells quantized and evaluated again, and what follows in their studies."""
    deep = {"measure_residual_error": labels & DEEP, "plot_residual_error": {""}} if labels & DEEP else {}
    return {
        "quantize_model": labels,
        "evaluate_perplexity": labels,
        "merge_shards": labels,
        **deep,
        **({"evaluate_tasks": {"none/rtn/int4"}} if tasks else {}),
        **studies(*names),
    }


def checked(model: str = "reference-1m-planted") -> Plan:
    """A model whose texts changed is checked again, before its tables."""
    return {"check_baseline": {model}}


def gated(*transforms: str, model: str = "") -> Plan:
    """Gates that run again: of the ``model``, and of transforms."""
    return {
        **({"gate_model": {model}} if model else {}),
        **({"gate_transform": set(transforms)} if transforms else {}),
    }


def described(*transforms: str, model: str = "reference-1m-planted") -> Plan:
    """Transforms described again, and what follows in the figures of their model."""
    return {"measure_distributions": set(transforms), "plot_distributions": {model}}


def of(part: str) -> set[str]:
    return {label for label in QUANTIZED if part in label.split("/")}


ALL = ("methods", "formats", "tasks")
NEW_STUDY = {
    "models": ["reference-1m-planted"],
    "transforms": ["smoothquant"],
    "mitigations": ["gptq"],
    "granularities": ["channel"],
    "formats": ["int4"],
    "table": {"rows": ["transform"], "columns": [], "metrics": ["perplexity"]},
    "figure": {"kind": "dots", "x": "transform", "hue": "mitigation", "metric": "perplexity", "scale": "log"},
}
EDITS: dict[str, tuple[Callable[[dict], Any], Plan]] = {
    "another alpha": (
        lambda c: c["transforms"]["smoothquant"].update(alpha=0.6),
        {
            "fit_transform": {"smoothquant"},
            **gated("smoothquant"),
            **described("smoothquant"),
            **cells(of("smoothquant"), "methods"),
        },
    ),
    "another rank": (lambda c: c["mitigations"]["low-rank"].update(rank=4), cells(of("low-rank"), "methods")),
    "another damping": (lambda c: c["mitigations"]["gptq"].update(damping=0.02), cells(of("gptq"), "methods")),
    "another seed": (
        lambda c: c.update(seed=8),
        {
            "tokenize_corpus": {"docs", "docs-calibration"},
            "calibrate_model": {"default"},
            "fit_transform": {"smoothquant"},
            **gated("smoothquant", model="reference-1m-planted"),
            **described("none", "smoothquant"),
            "evaluate_reference": {"docs"},
            **checked(),
            **cells(QUANTIZED, *ALL, tasks=True),
            "evaluate_perplexity": QUANTIZED | {FULL},
            "merge_shards": QUANTIZED | {FULL},
            "evaluate_tasks": {"none/rtn/int4", FULL},
        },
    ),
    "another calibration corpus": (
        lambda c: c["calibrations"]["default"].update(corpus="other"),
        {
            "tokenize_corpus": {"other"},
            "calibrate_model": {"default"},
            "fit_transform": {"smoothquant"},
            **gated("smoothquant", model="reference-1m-planted"),
            **described("none", "smoothquant"),
            **checked(),
            **cells(QUANTIZED, *ALL, tasks=True),
        },
    ),
    "another evaluation window": (
        lambda c: c["corpora"]["docs"].update(window=64),
        {
            "tokenize_corpus": {"docs"},
            "evaluate_reference": {"docs"},
            "evaluate_perplexity": QUANTIZED | {FULL},
            "merge_shards": QUANTIZED | {FULL},
            "measure_residual_error": DEEP,
            "plot_residual_error": {""},
            **checked(),
            **studies(*ALL),
        },
    ),
    "another list of tasks": (
        lambda c: c["studies"]["tasks"]["evaluate"]["tasks"].append("continuation"),
        {"evaluate_tasks": {"none/rtn/int4", FULL}, **studies("tasks")},
    ),
    "the style of a figure": (
        lambda c: c["studies"]["formats"]["figure"].update(scale="linear"),
        {"plot_study": {"formats"}, "build_report": {""}},
    ),
    "the selection of a table": (
        lambda c: c["studies"]["formats"]["table"].update(metrics=["perplexity"]),
        {"tabulate_study": {"formats"}, "build_report": {""}},
    ),
    "a new study of existing cells": (lambda c: c["studies"].update(mine=deepcopy(NEW_STUDY)), studies("mine")),
    "a new model in a study": (
        lambda c: (
            c["models"].update(second={"source": "local", "path": "tests/data/tiny-llama"}),
            c["studies"]["formats"].update(models=["reference-1m-planted", "second"]),
        ),
        {
            "fetch_model": {"second"},
            "tokenize_corpus": {"docs", "docs-calibration"},
            "calibrate_model": {"default"},
            "fit_transform": {"none"},
            "evaluate_reference": {"docs"},
            **gated(model="second"),
            **described("none", model="second"),
            **checked("second"),
            **cells({FULL, "none/rtn/int4", "none/rtn/fp4"}, "formats"),
        },
    ),
    "a removed cell": (lambda c: c["studies"]["methods"]["mitigations"].remove("low-rank"), studies("methods")),
    "a note for readers": (
        lambda c: c["models"]["reference-1m-planted"].update(note="another"),
        {"build_report": {""}},
    ),
}
# module, the function of it that is edited (none: a comment is added)
CODE: dict[str, tuple[str, str, Plan]] = {
    "a function of one mitigation": ("mitigations/methods/gptq.py", "solve", cells(of("gptq"), "methods")),
    "a function of one transform": (
        "transforms/recipes/scaling.py",
        "primitives",
        {
            "fit_transform": {"smoothquant"},
            **gated("smoothquant"),
            **described("smoothquant"),
            **cells(of("smoothquant"), "methods"),
        },
    ),
    "a function of both gates": (
        "evaluation/gates.py",
        "gate_tokens",
        {**gated("smoothquant", model="reference-1m-planted"), **shown(*ALL)},
    ),
    "a function that plots": (
        "reporting/figures/panels.py",
        "draw_dots",
        {
            "plot_study": set(ALL),
            "plot_distributions": {"reference-1m-planted"},
            **{rule: {""} for rule in ("plot_pareto", "plot_number_lines", "plot_residual_error", "build_report")},
        },
    ),
    "a comment in the library": ("quantizer/tensors.py", "", {}),
}


def test_nothing_is_planned_before_an_edit(finished: Checkout):
    assert planned(finished, "edits") == {}


@pytest.mark.parametrize("line", EDITS)
def test_an_edited_config_reruns_what_depends_on_it(finished: Checkout, line: str):
    change, expected = EDITS[line]
    config = finished.config("edits")
    change(config)
    finished.write_config(config)
    assert planned(finished) == expected


def edited(text: str, function: str) -> str:
    """``text`` with one statement more in a function, or with a comment more."""
    if not function:
        return text + "\n# edited\n"
    last = next(
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name == function
    ).body[-1]
    lines = text.splitlines(keepends=True)
    return "".join([*lines[: last.lineno - 1], " " * last.col_offset + "edited = 1\n", *lines[last.lineno - 1 :]])


@pytest.mark.parametrize("line", CODE)
def test_edited_code_reruns_what_runs_it(finished: Checkout, line: str):
    name, function, expected = CODE[line]
    path = finished.folder / LIBRARY / name
    before = path.read_text()
    try:
        path.write_text(edited(before, function))
        assert planned(finished, "edits") == expected
    finally:
        path.write_text(before)


@pytest.mark.parametrize("target", ["evaluations", "tables"])
def test_a_gate_that_runs_again_hides_no_new_cell(finished: Checkout, target: str):
    """Snakemake leaves out what is behind a job that runs again by ancient inputs only."""
    config = finished.config("edits")
    config["mitigations"]["gptq"]["damping"] = 0.02
    finished.write_config(config)
    path = finished.folder / LIBRARY / "evaluation" / "gates.py"
    before = path.read_text()
    try:
        path.write_text(edited(before, "gate_tokens"))
        found = planned(finished, "edited", target)
    finally:
        path.write_text(before)
    assert found["quantize_model"] == found["evaluate_perplexity"] == of("gptq")
    assert found.items() >= gated("smoothquant", model="reference-1m-planted").items()


def test_a_comment_a_new_order_and_an_edit_taken_back_rerun_nothing(finished: Checkout):
    config = finished.config("edits")
    path = finished.write_config({key: config[key] for key in reversed(config)})
    path.write_text("# a comment\n" + path.read_text())
    assert planned(finished) == {}
    (finished.folder / LIBRARY / "quantizer/tensors.py").touch()
    assert planned(finished) == {}


def test_without_kept_checkpoints_another_window_quantizes_again(finished: Checkout, tmp_path):
    """Checkpoints are deleted once they are evaluated, so a later evaluation makes them again, and
    what else reads them follows; transforms and statistics stay."""
    checkout = finished.copy(tmp_path / "quantgrid")
    shutil.rmtree(checkout.folder / "results-edits" / "quantized")
    config = checkout.config("edits") | {"keep_checkpoints": False}
    config["corpora"]["docs"]["window"] = 64
    checkout.write_config(config)
    plan = planned(checkout)
    assert plan["quantize_model"] == QUANTIZED | {FULL} and not {"fit_transform", "calibrate_model"} & set(plan)
    assert plan["evaluate_tasks"] == {FULL, "none/rtn/int4"}


def test_the_table_of_the_documents_has_these_lines():
    table = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs" / "how-to" / "edits.md").read_text(), re.MULTILINE)
    assert set(table) - {"edit", ":--"} == {*EDITS, *CODE, "a comment, the order of keys, an undone edit"}
