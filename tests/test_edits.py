"""What an edit reruns: every line of the table in docs/edits.md, by a dry run over a folder in which everything has been computed."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from workflow import ROOT, Checkout

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
Plan = dict[str, set[str]]
METHODS = [(transform, mitigation) for transform in ("none", "smoothquant") for mitigation in ("rtn", "gptq", "low-rank")]
QUANTIZED = {f"{transform}/{mitigation}/int4" for transform, mitigation in METHODS} | {"none/rtn/fp4"}
DEEP = {"none/rtn/int4", "none/rtn/fp4"}  # those of the study of formats, which measures the error over depth
FULL = "none/none/bf16"
LIBRARY = "scripts/quantgrid"


def edits_config(config: dict[str, Any]) -> dict[str, Any]:
    """Seven quantized cells in three studies, every checkpoint kept."""
    common = {"models": ["reference-1m-planted"], "transforms": ["none"], "mitigations": ["rtn"], "granularities": ["channel"], "formats": ["int4"]}
    table = {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity", "kl_divergence"]}
    figure = {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "perplexity", "scale": "log"}
    config["corpora"]["other"] = {**config["corpora"]["docs-calibration"], "windows": 16}
    config["transforms"] = {"none": {"method": "none"}, "smoothquant": {"method": "scaling", "alpha": 0.5}}
    config["mitigations"] = {"rtn": {"method": "rtn"}, "gptq": {"method": "gptq", "damping": 0.01}, "low-rank": {"method": "low_rank", "rank": 8}}
    config |= {"formats": {}, "results_dir": "results-edits", "keep_checkpoints": True, "report": {"distributions": ["smoothquant"]}}
    config["studies"] = {
        "methods": {**common, "transforms": ["none", "smoothquant"], "mitigations": ["rtn", "gptq", "low-rank"], "table": table, "figure": figure},
        "formats": {**common, "formats": ["int4", "fp4"], "evaluate": {"depth": ["docs"]}, "table": {**table, "rows": ["format"]},
                    "figure": {**figure, "x": "format"}},
        "tasks": {**common, "evaluate": {"perplexity": [], "tasks": ["cloze"]}, "table": {**table, "metrics": ["accuracy"]},
                  "figure": {**figure, "metric": "accuracy", "dataset": "cloze", "scale": "linear"}}}
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("edits") / "quantgrid")
    checkout.write_config(edits_config(checkout.config()), "edits")
    checkout.pretend("edits")
    return checkout


def planned(checkout: Checkout, name: str = "edited") -> Plan:
    """Rule -> what its jobs are called: a cell without model and granularity, a study, or the last axis of a step."""
    found: Plan = {}
    for rule, axes in checkout.planned(name):
        if "format" in axes:
            label = "/".join(axes[axis] for axis in ("transform", "mitigation", "format"))
        else:
            label = next((axes[axis] for axis in ("study", "corpus", "calibration", "transform", "model") if axis in axes), "")
        found.setdefault(rule, set()).add(label)
    found.pop("all", None)
    return found


def studies(*names: str) -> Plan:
    """What follows from new evaluations in these studies."""
    return {**{rule: set(names) for rule in ("collect_study", "tabulate_study", "plot_study")},
            **{rule: {""} for rule in ("collect_results", "list_steps", "evaluate_claims", "plot_pareto", "build_report")}}


def cells(labels: set[str], *names: str, tasks: bool = False) -> Plan:
    """Cells quantized and evaluated again, and what follows in their studies."""
    depth = {"measure_depth": labels & DEEP, "plot_depth": {""}} if labels & DEEP else {}
    return {"quantize_model": labels, "evaluate_perplexity": labels, **depth, **({"evaluate_tasks": {"none/rtn/int4"}} if tasks else {}),
            **studies(*names)}


def checked(model: str = "reference-1m-planted") -> Plan:
    """A model whose texts changed is checked again, before its tables."""
    return {"check_model": {model}}


def described(*transforms: str, model: str = "reference-1m-planted") -> Plan:
    """Transforms described again, and what follows in the figures of their model."""
    return {"describe_transform": set(transforms), "plot_distributions": {model}}


def of(part: str) -> set[str]:
    return {label for label in QUANTIZED if part in label.split("/")}


ALL = ("methods", "formats", "tasks")
NEW_STUDY = {"models": ["reference-1m-planted"], "transforms": ["smoothquant"], "mitigations": ["gptq"], "granularities": ["channel"],
             "formats": ["int4"], "table": {"rows": ["transform"], "columns": [], "metrics": ["perplexity"]},
             "figure": {"kind": "dots", "x": "transform", "hue": "mitigation", "metric": "perplexity", "scale": "log"}}
EDITS: dict[str, tuple[Callable[[dict], Any], Plan]] = {
    "another alpha": (lambda c: c["transforms"]["smoothquant"].update(alpha=0.6),
                      {"fit_transform": {"smoothquant"}, **described("smoothquant"), **cells(of("smoothquant"), "methods")}),
    "another rank": (lambda c: c["mitigations"]["low-rank"].update(rank=4), cells(of("low-rank"), "methods")),
    "another damping": (lambda c: c["mitigations"]["gptq"].update(damping=0.02), cells(of("gptq"), "methods")),
    "another seed": (lambda c: c.update(seed=8),
                     {"tokenize_corpus": {"docs", "docs-calibration"}, "calibrate_model": {"default"}, "fit_transform": {"smoothquant"},
                      **described("none", "smoothquant"), "evaluate_reference": {"docs"}, **checked(), **cells(QUANTIZED, *ALL, tasks=True),
                      "evaluate_perplexity": QUANTIZED | {FULL}, "evaluate_tasks": {"none/rtn/int4", FULL}}),
    "another calibration corpus": (lambda c: c["calibrations"]["default"].update(corpus="other"),
                                   {"tokenize_corpus": {"other"}, "calibrate_model": {"default"}, "fit_transform": {"smoothquant"},
                                    **described("none", "smoothquant"), **checked(), **cells(QUANTIZED, *ALL, tasks=True)}),
    "another evaluation window": (lambda c: c["corpora"]["docs"].update(window=64),
                                  {"tokenize_corpus": {"docs"}, "evaluate_reference": {"docs"}, "evaluate_perplexity": QUANTIZED | {FULL},
                                   "measure_depth": DEEP, "plot_depth": {""}, **checked(), **studies(*ALL)}),
    "another list of tasks": (lambda c: c["studies"]["tasks"]["evaluate"]["tasks"].append("continuation"),
                              {"evaluate_tasks": {"none/rtn/int4", FULL}, **studies("tasks")}),
    "the style of a figure": (lambda c: c["studies"]["formats"]["figure"].update(scale="linear"), {"plot_study": {"formats"}, "build_report": {""}}),
    "the selection of a table": (lambda c: c["studies"]["formats"]["table"].update(metrics=["perplexity"]),
                                 {"tabulate_study": {"formats"}, "build_report": {""}}),
    "a new study of cells that exist": (lambda c: c["studies"].update(mine=deepcopy(NEW_STUDY)), studies("mine")),
    "a new model in a study": (lambda c: (c["models"].update(second={"source": "local", "path": "tests/data/tiny-llama"}),
                                          c["studies"]["formats"].update(models=["reference-1m-planted", "second"])),
                               {"fetch_model": {"second"}, "tokenize_corpus": {"docs", "docs-calibration"}, "calibrate_model": {"default"},
                                "fit_transform": {"none"}, "evaluate_reference": {"docs"}, **described("none", model="second"), **checked("second"),
                                **cells({FULL, "none/rtn/int4", "none/rtn/fp4"}, "formats")}),
    "a cell taken out": (lambda c: c["studies"]["methods"]["mitigations"].remove("low-rank"), studies("methods")),
    "a note for readers": (lambda c: c["models"]["reference-1m-planted"].update(note="another"), {"build_report": {""}}),
}
CODE: dict[str, tuple[str, str, Plan]] = {  # module, the function of it that is edited (none: a comment is added)
    "a function of one mitigation": ("mitigations/gptq.py", "solve", cells(of("gptq"), "methods")),
    "a function of one transform": ("transforms/scaling.py", "primitives",
                                    {"fit_transform": {"smoothquant"}, **described("smoothquant"), **cells(of("smoothquant"), "methods")}),
    "a function that plots": ("reporting/panels.py", "draw_dots",
                              {"plot_study": set(ALL), "plot_distributions": {"reference-1m-planted"},
                               **{rule: {""} for rule in ("plot_pareto", "plot_number_lines", "plot_depth", "build_report")}}),
    "a comment in the library": ("quantizer.py", "", {}),
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
    last = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name == function).body[-1]
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


def test_a_comment_a_new_order_and_an_edit_taken_back_rerun_nothing(finished: Checkout):
    config = finished.config("edits")
    path = finished.write_config({key: config[key] for key in reversed(config)})
    path.write_text("# a comment\n" + path.read_text())
    assert planned(finished) == {}
    (finished.folder / LIBRARY / "quantizer.py").touch()
    assert planned(finished) == {}


def test_without_kept_checkpoints_another_window_quantizes_again(finished: Checkout, tmp_path):
    """Checkpoints are deleted once they are evaluated, so a later evaluation makes them again, and what else reads them follows; transforms and
    statistics stay."""
    checkout = finished.copy(tmp_path / "quantgrid")
    shutil.rmtree(checkout.folder / "results-edits" / "quantized")
    config = checkout.config("edits") | {"keep_checkpoints": False}
    config["corpora"]["docs"]["window"] = 64
    checkout.write_config(config)
    plan = planned(checkout)
    assert plan["quantize_model"] == QUANTIZED | {FULL} and not {"fit_transform", "calibrate_model"} & set(plan)
    assert plan["evaluate_tasks"] == {FULL, "none/rtn/int4"}


def test_the_table_of_the_documents_has_these_lines():
    table = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs" / "edits.md").read_text(), re.MULTILINE)
    assert set(table) - {"edit", ":--"} == {*EDITS, *CODE, "a comment, the order of keys, an edit taken back"}
