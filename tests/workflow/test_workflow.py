"""The workflow end to end on the smoke config: outputs, golden numbers, what an edit reruns, a new
method, one table alone."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from checkouts import ROOT, Checkout
from quantgrid.config.shown_transforms import FIGURES
from selection import others_slow

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]  # the first waits for the smoke run
RESULTS = "results-smoke"
GOLDEN = ROOT / "tests" / "data" / "golden-smoke.csv"
EXAMPLE = ROOT / "docs" / "examples" / "scaled_hadamard.py"
SAY_TIMERS = """
onsuccess:
    import threading
    sys.stderr.write(f"TIMERS {sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())}\\n")
"""


def rows(checkout: Checkout, results: str = RESULTS) -> list[dict[str, str]]:
    return list(csv.DictReader((checkout.folder / results / "results.csv").open()))


def axes(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[axis] for axis in ("model", "transform", "mitigation", "granularity", "format"))


def cells_of(jobs: list[tuple[str, dict[str, str]]], rule: str) -> set[tuple[str, str, str]]:
    return {(w["transform"], w["mitigation"], w["format"]) for name, w in jobs if name == rule}


def test_every_output_is_there_and_no_cell_failed(smoke: Checkout):
    folder = smoke.folder / RESULTS
    for study in smoke.config()["studies"]:
        for path in (
            f"tables/{study}.csv",
            f"tables/{study}.md",
            f"tables/{study}.tex",
            f"figures/{study}.png",
            f"figures/{study}.pdf",
            f"figures/{study}.svg",
            f"figures/{study}.csv",
            f"studies/{study}.csv",
            f"studies/{study}.items.parquet",
        ):
            assert (folder / path).stat().st_size > 0, path
    compared = [study for study, content in smoke.config()["studies"].items() if "compare" in content]
    assert compared
    assert all(
        (folder / "comparisons" / f"{study}.{suffix}").stat().st_size > 0
        for study in compared
        for suffix in ("csv", "md", "tex")
    )
    assert {row["status"] for row in rows(smoke)} == {"ok"}
    assert {"perplexity", "kl_divergence", "accuracy", "bits_per_weight", "weight_sqnr_db"} <= {
        row["metric"] for row in rows(smoke)
    }
    assert (folder / "results.parquet").is_file()
    overview = [
        f"{name}.{kind}"
        for name in ("pareto", "number-lines", "residual-error", "allocations")
        for kind in ("png", "pdf", "svg", "csv")
    ]
    for path in ("claims.csv", "checks/reference-1m-planted.json", *overview):
        assert (folder / path).stat().st_size > 0, path
    page = (folder / "report.html").read_text()
    assert 'src="http' not in page and 'href="http' not in page
    assert all(study["title"] in page for study in smoke.config()["studies"].values())
    assert page.count("Paired comparisons</h3>") == len(compared)
    assert (
        'id="findings"' in page
        and "Divergence and bits" in page
        and "Recommended recipes" in page
        and "W4A16 NF4 channel RTN" in page
        and "model reference-1m-planted" in page
        and "normalization token" in page
    )
    assert "Error of the residual stream over the layers" in page and "Allocations of bits" in page
    assert page.count('href="data:text/csv;base64,') == 2 * len(smoke.config()["studies"]) + 4


def test_every_row_says_how_it_was_measured(smoke: Checkout):
    measured = [row for row in rows(smoke) if row["metric"] in ("perplexity", "kl_divergence", "accuracy")]
    protocols = {row["metric"]: json.loads(row["protocol"]) for row in measured}
    assert len(measured) > 20 and all(json.loads(row["protocol"])["dtype"] == "float32" for row in measured)
    perplexity = protocols["perplexity"]
    assert (perplexity["corpus"], perplexity["window"], perplexity["stride"], perplexity["bos"]) == (
        "docs",
        128,
        128,
        False,
    )
    assert (
        len(perplexity["text_sha256"]) == 64
        and perplexity["normalization"] == "token"
        and protocols["accuracy"]["batch_size"] > 0
    )


def test_claims_are_judged_on_every_model(smoke: Checkout):
    found = list(csv.DictReader((smoke.folder / RESULTS / "claims.csv").open()))
    verdicts = {row["claim"]: row["verdict"] for row in found}
    assert (
        set(verdicts.values()) <= {"holds", "does not hold", "undecided", "not measured"}
        and verdicts["finer-groups-cost"] == "holds"
    )
    assert {verdicts[claim] for claim in ("two-steps-add-up", "larger-models")} == {"not measured"}, (
        "no published entries, no larger model"
    )
    assert all(float(row["low"]) <= float(row["effect"]) <= float(row["high"]) for row in found if row["effect"])


def test_every_method_and_every_format_of_the_registry_is_in_the_smoke_config():
    from quantgrid.config import registry

    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    for axis in ("transforms", "mitigations"):
        used = {entry["method"] for entry in config[axis].values()} | {"none"}
        assert used == set(registry.METHODS[axis]), axis


def golden_limit(cell: tuple, perplexity: float) -> float:
    """Largest change of a logarithm of perplexity that arithmetic explains: 2 %, 10 % above a
    perplexity of 1,000, 5 % after training, which amplifies a difference in the last bit."""
    trained = {"optimized", "flatquant", "finetuned", "qat"}
    if perplexity >= 1000:
        return 0.1
    return 0.05 if any(method.startswith(tuple(trained)) for method in cell[1:3]) else 0.02


def test_golden_numbers(smoke: Checkout):
    found = {axes(row): float(row["value"]) for row in rows(smoke) if row["metric"] == "perplexity"}
    golden = {axes(row): float(row["perplexity"]) for row in csv.DictReader(GOLDEN.open())}
    assert set(found) == set(golden)
    far = {
        cell: (found[cell], value)
        for cell, value in golden.items()
        if abs(math.log(found[cell] / value)) > golden_limit(cell, value)
    }
    assert not far


def test_quantization_orders_the_cells_as_it_must(smoke: Checkout):
    """Orders with a wide margin on this model: outliers ruin INT4, rotation repairs it, GPTQ
    leaves less output error than RTN."""
    value = {
        (row["transform"], row["mitigation"], row["granularity"], row["format"], row["metric"]): float(row["value"])
        for row in rows(smoke)
        if row["value"]
    }
    full = value["none", "none", "-", "bf16", "perplexity"]
    rtn = value["none", "rtn", "channel", "int4", "perplexity"]
    assert rtn > 3.5 * full
    assert value["hadamard-s0", "gptq", "channel", "int4", "perplexity"] < 1.3 * full
    assert (
        value["none", "gptq", "channel", "int4", "output_sqnr_db"]
        > value["none", "rtn", "channel", "int4", "output_sqnr_db"]
    )
    assert (
        value["none", "rtn", "channel", "int8", "kl_divergence"]
        < value["none", "rtn", "channel", "int4", "kl_divergence"] / 10
    )


def divergences(checkout: Checkout) -> dict[tuple[str, ...], list[float]]:
    """Map the axes of every quantized cell of the smoke run to its divergence in each window."""
    found = {}
    for path in (checkout.folder / RESULTS / "evaluations").glob("*/*/*/*/*/perplexity/docs/*.json"):
        content = json.loads(path.read_text())
        if content["axes"]["mitigation"] != "none":
            found[axes(content["axes"])] = content["windows"]["kl_divergence"]
    return found


@pytest.mark.parametrize("budget", [4.25, 4.5, 16])
def test_a_race_over_the_grid_ends_with_the_recipes_that_all_windows_leave(smoke: Checkout, budget: float):
    """One test on all windows, at the level of the race, against looks of 4, 8 and 16 windows."""
    from quantgrid.config.races import is_within
    from quantgrid.evaluation.races import Conditions, cut, decide, race, spent

    bits = {axes(row): float(row["value"]) for row in rows(smoke) if row["metric"] == "stored_bits_per_weight"}
    losses = {"/".join(cell): own for cell, own in divergences(smoke).items() if is_within(bits[cell], budget)}
    conditions = Conditions((4, 8, 16), len(losses))
    outcome = race({name: cut(own, conditions.looks) for name, own in losses.items()}, conditions)
    assert set(outcome.survivors) == set(decide(losses, {}, conditions).survivors)
    assert len(losses) >= 20 and spent(outcome, conditions) < 0.8


def test_trainings_leave_their_losses_and_no_state(smoke: Checkout):
    folder = smoke.folder / RESULTS
    learned = {
        name: entry
        for name, entry in smoke.config()["transforms"].items()
        if "steps" in entry and entry["method"] != "duquant"
    }
    assert len(learned) == 5 and not list(folder.glob("t*/**/training.safetensors"))
    losses = list(csv.DictReader((folder / "learning.csv").open()))
    labels = [row["label"].split(", ") for row in losses]
    assert {(label[1], label[2]) for label in labels if len(label) == 5} == {
        ("none", "finetuned"),
        ("none", "learned-rounding"),
        ("none", "distilled"),
        ("quarot", "qat_finetune"),
    }
    assert {label[1] for label in labels if len(label) < 5} == set(learned)
    for name, entry in learned.items():
        [path] = folder.glob(f"transforms/reference-1m-planted/{name}/*/*/losses.csv")
        rows = list(csv.DictReader(path.open()))
        assert {int(row["step"]) for row in rows} == set(range(1, entry["steps"] + 1)) and all(
            math.isfinite(float(row["loss"])) for row in rows
        )
    assert all((folder / f"learning.{suffix}").stat().st_size > 0 for suffix in ("png", "pdf", "svg"))
    assert "Training of learned transforms" in (folder / "report.html").read_text()


def test_distributions_are_described_drawn_and_shown(smoke: Checkout):
    folder = smoke.folder / RESULTS / "distributions" / "reference-1m-planted"
    names = {"none", "smoothquant", "hadamard-s0", "duquant"}
    assert {path.parent.parent.name for path in folder.glob("*/*/*.json")} == names
    table = list(csv.DictReader((folder / "kurtosis-inputs.csv").open()))
    assert {row["transform"] for row in table} == {"no transform", *names} - {"none"} and len(table) == 4 * 4 * 4
    middle = {(row["transform"], row["site"], row["layer"]): float(row["row_kurtosis"]) for row in table}
    assert all(
        middle["hadamard-s0", "mlp_input", str(layer)] < middle["no transform", "mlp_input", str(layer)] / 2
        for layer in range(4)
    )
    assert all(
        (folder / f"{name}.{suffix}").stat().st_size > 0 for name in FIGURES for suffix in ("png", "pdf", "svg", "csv")
    )
    assert "Inputs and weights before rounding" in (smoke.folder / RESULTS / "report.html").read_text()


def test_nothing_to_do_afterwards(smoke: Checkout):
    assert "Nothing to be done" in smoke.run("smoke", "--dry-run")


def test_nothing_of_a_whole_run_is_unused_and_steps_are_listed(smoke: Checkout):
    done = subprocess.run(
        [sys.executable, "scripts/clean_unused.py", "--configfile", "config/smoke.yaml"],
        cwd=smoke.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " 0 files that config/smoke.yaml no longer plans" in done.stdout, done.stdout
    steps = list(csv.DictReader((smoke.folder / RESULTS / "steps.csv").open()))
    gone = [step["path"] for step in steps if not (smoke.folder / step["path"]).exists()]
    assert gone and all(path.endswith("/model.safetensors") for path in gone), (
        "checkpoints alone are deleted after their evaluation"
    )


def test_an_edited_alpha_reruns_the_cells_with_scaling_only(smoke: Checkout):
    config = smoke.config()
    config["transforms"]["smoothquant"]["alpha"] = 0.6
    smoke.write_config(config)
    jobs = smoke.planned("edited")
    assert (
        cells_of(jobs, "quantize_model")
        == cells_of(jobs, "evaluate_perplexity")
        == cells_of(jobs, "merge_shards")
        == {("smoothquant", "gptq", "int4")}
    )
    assert {w["transform"] for rule, w in jobs if rule == "fit_transform"} == {"smoothquant"}
    assert {w["study"] for rule, w in jobs if "study" in w} == {"methods"}
    assert not {rule for rule, _ in jobs} & {
        "fetch_model",
        "tokenize_corpus",
        "calibrate_model",
        "evaluate_reference",
        "evaluate_tasks",
    }


@pytest.mark.slow
def test_an_added_mitigation_runs_its_new_cells_only(smoke: Checkout):
    config = smoke.config()
    config["studies"]["formats"]["mitigations"].append("gptq")
    config["studies"]["formats"]["formats"] = ["int4", "fp4"]
    smoke.write_config(config)
    jobs = smoke.planned("edited")
    assert cells_of(jobs, "quantize_model") == {
        ("none", "gptq", "fp4")
    }  # gptq with int4 is a cell of another study already


PRESENTATION = {
    "title": (
        lambda config: config["studies"]["formats"].update(title="Another title"),
        {"tabulate_study", "plot_study"},
    ),
    "metrics": (
        lambda config: config["studies"]["formats"]["table"].update(metrics=["perplexity"]),
        {"tabulate_study"},
    ),
    "scale": (lambda config: config["studies"]["formats"]["figure"].update(scale="linear"), {"plot_study"}),
    "note": (lambda config: config["models"]["reference-1m-planted"].update(note="another note"), set()),
    "distributions": (
        lambda config: config["report"].update(distributions=["hadamard"]),
        {"plot_distributions", "list_steps"},
    ),
}


@pytest.mark.parametrize(
    "edits", others_slow([list(PRESENTATION), *([name] for name in PRESENTATION)], lambda e: len(e) > 1)
)
def test_an_edit_of_the_presentation_computes_no_cell(smoke: Checkout, edits):
    config = smoke.config()
    for name in edits:
        PRESENTATION[name][0](config)
    smoke.write_config(config)
    planned = {rule for rule, _ in smoke.planned("edited")} - {"build_report", "all"}
    assert planned == set().union(*(PRESENTATION[name][1] for name in edits))


def test_one_table_by_itself(smoke: Checkout, tmp_path: Path):
    config = smoke.config()
    config["results_dir"] = "results-one"
    smoke.write_config(config, "one")
    jobs = smoke.planned("one", "--table", "granularity")
    assert {w["granularity"] for rule, w in jobs if rule == "quantize_model"} == {"-", "tensor", "group-32"}
    assert {rule for rule, _ in jobs} == {
        "fetch_model",
        "tokenize_corpus",
        "calibrate_model",
        "fit_transform",
        "gate_model",
        "quantize_model",
        "evaluate_reference",
        "evaluate_perplexity",
        "merge_shards",
        "evaluate_tasks",
        "check_baseline",
        "collect_study",
        "tabulate_study",
    }


@pytest.mark.slow
def test_a_new_transform_is_one_file_one_line_and_one_name(smoke: Checkout, tmp_path: Path):
    """The documented example becomes part of tables and figures, and no cell that existed is
    computed again."""
    checkout = smoke.copy(tmp_path / "quantgrid")
    library = checkout.folder / "scripts" / "quantgrid"
    shutil.copy(EXAMPLE, library / "transforms" / "recipes" / EXAMPLE.name)
    line = next(
        line for line in EXAMPLE.read_text().splitlines() if line.strip().startswith('"scaled_hadamard": Method(')
    )
    registry = library / "config" / "transform_methods.py"
    first = '    "none": Method("transforms.recipes.none"'
    registry.write_text(registry.read_text().replace(first, f"{line}\n{first}"))
    config = checkout.config()
    config["studies"]["methods"]["also"].append({"transforms": ["scaled_hadamard"], "mitigations": ["gptq"]})
    checkout.write_config(config, "smoke")
    assert cells_of(checkout.planned("smoke"), "quantize_model") == {("scaled_hadamard", "gptq", "int4")}
    checkout.run("smoke")
    assert "scaled_hadamard" in (checkout.folder / RESULTS / "tables" / "methods.csv").read_text()
    assert "scaled_hadamard" in (checkout.folder / RESULTS / "figures" / "methods.csv").read_text()
    value = {
        row["transform"]: float(row["value"])
        for row in rows(checkout)
        if row["metric"] == "perplexity" and row["mitigation"] == "gptq"
    }
    assert value["scaled_hadamard"] < value["none"] / 3


def test_every_json_says_what_it_is_and_what_it_read(smoke: Checkout):
    for name, content in smoke.contents(RESULTS, "evaluations/**/*.json").items():
        about = json.loads(content)
        assert (
            about["status"] == "ok" and about["axes"]["model"] == "reference-1m-planted" and about["versions"]["torch"]
        ), name
        assert all(len(digest) == 64 for digest in about["inputs"].values()) and (
            about["inputs"] or "/bf16/" in name
        ), name


def test_logs_open_with_what_runs_and_close_with_what_it_cost(smoke: Checkout):
    logs = smoke.contents(RESULTS, "logs/*_*/**/*.log")
    assert len(logs) > 80
    for name, content in logs.items():
        lines, rule = content.decode().splitlines(), name.split("/")[1].removesuffix(".log")
        assert lines[0].startswith(f"{rule}: ") and "python 3." in lines[1], name
        assert re.fullmatch(r"done in \d+\.\d s, peak memory \d+ MiB", lines[-1]), name
    [calibration] = [content.decode() for name, content in logs.items() if "/calibrate_model/" in name]
    assert all(
        said in calibration
        for said in (
            "calibrate_model: model reference-1m-planted, calibration default",
            "seed 7, device cpu",
            "torch 2.",
        )
    )


@pytest.mark.slow
def test_figures_come_back_from_records_or_results_csv_alone_without_torch(
    smoke: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Models, statistics, checkpoints and evaluations are deleted; torch cannot be imported."""
    checkout = smoke.copy(tmp_path / "quantgrid")
    before = checkout.contents(RESULTS, "figures/*")
    for path in (checkout.folder / RESULTS).iterdir():
        if path.is_dir() and path.name not in ("studies", "digests", "logs", "benchmarks"):
            shutil.rmtree(path)
    (tmp_path / "without" / "torch").mkdir(parents=True)
    (tmp_path / "without" / "torch" / "__init__.py").write_text("raise ImportError('this test does without torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    with (checkout.folder / "Snakefile").open("a") as file:
        file.write(SAY_TIMERS)
    output = checkout.run("smoke", "figures")
    ran = set(re.findall(r"^[\d:]+  \d+/\d+ steps.*: (\w+)", output, re.MULTILINE))
    assert ran == {"plot_study", "figures"}
    assert "\nTIMERS 0\n" in output, "finished jobs leave no timers that wake the scheduler"
    assert checkout.contents(RESULTS, "figures/*") == before
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(checkout.folder / RESULTS / "results.csv", only)
    command = [
        "scripts/redraw_figures.py",
        "--configfile",
        "config/smoke.yaml",
        "--results",
        only / "results.csv",
        "--folder",
        only,
    ]
    subprocess.run([sys.executable, *command], cwd=checkout.folder, check=True)
    assert {
        f"figures/{path.name}": path.read_bytes() for path in only.iterdir() if path.name != "results.csv"
    } == before
