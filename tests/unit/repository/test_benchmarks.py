"""Evaluation of benchmark measurements: ratios, goals, memory; and equal names of the parts in
Makefile, scripts and documents."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from test_environments import pins

from checkouts import ROOT

FOLDER = ROOT / "tests" / "benchmarks"
PARTS = re.search(r"^BENCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A benchmark as a module; what they import from each other lies in their folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def named(name: str) -> ModuleType:
        return importlib.import_module(name)

    return named


def values(rows: list[dict[str, object]]) -> dict[tuple[object, object], tuple[float, object, object]]:
    """(case, reference) -> ratio, goal, whether it is reached."""
    return {(row["case"], row["reference"]): (float(row["ratio"]), row["goal"], row["reached"]) for row in rows}


def test_every_part_is_a_script_and_is_described():
    described = (ROOT / "docs" / "explanation" / "performance.md").read_text()
    assert all((FOLDER / f"{part}.py").is_file() and f"| `{part}` |" in described for part in PARTS)


@pytest.mark.parametrize("name", ["peers", "gptqmodel"])
def test_environments_of_peers_are_pinned(name):
    assert {"torch", "transformers", "safetensors"} <= set(pins(Path(ROOT, "envs", f"requirements-{name}.txt")))
    assert f".venv-{name}" in (ROOT / "Makefile").read_text()


def test_the_grid_counts_low_rank_of_the_peer_as_nothing(load):
    grid = load("grid")
    taken = {
        grid.SIX: [grid.Measured(10, 30, 500, {})],
        grid.TWELVE: [grid.Measured(20, 60, 600, {}), grid.Measured(40, 60, 700, {})],
        grid.PEER: [grid.Measured(100, 30, 900, {})],
    }
    found = values(grid.rows_of(taken, argparse.Namespace(threads=2)))
    assert found[grid.TWELVE, grid.PEER_TWICE] == (pytest.approx(90 / 260, rel=1e-2), "0.5", "yes")
    assert found[grid.TWELVE + grid.QUANTIZATIONS, grid.PEER_TWICE + grid.QUANTIZATIONS] == (
        pytest.approx(30 / 200, rel=1e-2),
        "0.2",
        "yes",
    )
    assert found[grid.TWELVE + grid.EVALUATIONS, grid.PEER_TWICE] == (pytest.approx(60 / 260, rel=1e-2), "", "")
    assert found[grid.SIX, grid.PEER] == (pytest.approx(40 / 130, rel=1e-2), "0.5", "yes")
    assert found[grid.SIX + grid.QUANTIZATIONS, grid.PEER + grid.QUANTIZATIONS] == (0.1, "0.2", "yes")


def test_the_grid_has_twelve_cells_of_which_the_peer_has_six(load):
    grid, configs, planned = (
        load("grid"),
        importlib.import_module("quantgrid.config.validation"),
        importlib.import_module("quantgrid.plan.pipeline"),
    )
    options = argparse.Namespace(
        config=ROOT / "config" / "config.yaml", model=None, corpus="library-docs", group_size=64, threads=2
    )
    cells = {
        name: [
            cell
            for cell in planned.Plan(configs.check(grid.config_of(options, mitigations, Path("results")))).cells
            if cell.quantized
        ]
        for name, mitigations in grid.GRIDS.items()
    }
    assert {name: len(found) for name, found in cells.items()} == {grid.SIX: 6, grid.TWELVE: 12}
    assert {cell.granularity for cell in cells[grid.TWELVE]} == {"group-64"} and {
        cell.model for cell in cells[grid.TWELVE]
    } == {"smollm2-135m"}


def test_evaluation_is_held_against_the_inverse_of_speeds(load):
    evaluation = load("evaluation")
    sides = [*evaluation.CASES, evaluation.PLAIN]
    found = {
        "milliseconds": {
            f"{side}{part}": 100.0 + 30 * number
            for number, side in enumerate(reversed(sides))
            for part in evaluation.PARTS
        }
    }
    rows = values(evaluation.rows_of(found, dict.fromkeys(sides, 1000.0), argparse.Namespace(threads=1, repeats=1)))
    assert rows["INT4 per channel, online rotation", evaluation.PLAIN] == (1.3, "1.43", "yes")
    assert rows["NVFP4", evaluation.PLAIN] == (1.6, "1.67", "yes") and rows["INT4 per channel", evaluation.PLAIN] == (
        1.9,
        "1.25",
        "no",
    )
    assert sum(goal != "" for _, goal, _ in rows.values()) == len(evaluation.CASES), "the run as it is, not parts of it"


def test_jobs_are_held_against_their_limits_and_against_their_imports(load):
    jobs, run = load("jobs"), load("turns").Process
    seconds = {
        jobs.TORCH: 2.0,
        jobs.TRANSFORMERS: 5.0,
        "job fit_transform": 2.5,
        "job evaluate_perplexity": 8.0,
        "job evaluate_tasks": 10.0,
    }
    taken = {name: [run(taken, taken, 100, "")] for name, taken in seconds.items()}
    cases = {name: jobs.Case(None, jobs.NEEDS[name.removeprefix("job ")]) for name in taken if name.startswith("job ")}
    found = values(jobs.rows_of(taken, cases, 1))
    assert found["job fit_transform", "limit of 3 s"] == (pytest.approx(0.833, abs=1e-3), "1", "yes")
    assert found["job evaluate_perplexity", "limit of 7 s"] == (pytest.approx(1.14, abs=1e-2), "1", "no")
    assert found["job fit_transform", jobs.TORCH] == (1.25, "", "") and found[
        "job evaluate_tasks", jobs.TRANSFORMERS
    ] == (2.0, "", "")
    assert not any(case == "job evaluate_tasks" and goal for (case, _), (_, goal, _) in found.items())
    taken["job fit_transform, warm start"] = [run(0.5, 0.1, 10, "")]
    assert values(jobs.rows_of(taken, cases, 1))["job fit_transform, warm start", "job fit_transform"] == (0.2, "", "")
    smoke = values(jobs.rows_of_smoke({"smoke run on 2 cores, warm start": 180.0, "smoke run on 2 cores": 300.0}))
    assert list(smoke.values()) == [(0.75, "1", "yes"), (1.25, "", "")]


def test_gptq_is_held_against_every_peer(load):
    gptq = load("gptq")
    goals = {(case, peer): goal for case, peer, goal in gptq.WANTED}
    assert all(
        goals[gptq.CACHED, peer] == 1 / 5 and goals[gptq.CALIBRATED, peer] == 2 / 3
        for peer in (gptq.ONESHOT, gptq.GPTQMODEL)
    )


@pytest.mark.parametrize("script", [*FOLDER.glob("*.py"), *(ROOT / "docs").glob("*.py")], ids=lambda path: path.name)
def test_scripts_import_what_the_library_has(script):
    """No test runs all of them, and they import inside functions."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantgrid"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module}.{name}"
