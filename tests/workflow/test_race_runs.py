"""Races through the workflow: results, what an addition computes, kills, and the command for the best
recipe."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_interruption import wait_for

from checkouts import Checkout

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(1800)]
RESULTS = "results-race"
MODEL = "reference-1m-planted"


def race_config(config: dict[str, Any]) -> dict[str, Any]:
    """Six candidates, of which those with a rotation are far better; 32 windows in three looks."""
    docs = config["corpora"]["docs"]
    return {
        **config,
        "results_dir": RESULTS,
        "corpora": {**config["corpora"], "race-text": {**docs, "windows": 32, "skip_windows": docs["windows"]}},
        "transforms": {
            "smooth": {"method": "scaling", "alpha": 0.5},
            "hadamard": {"method": "random_hadamard", "seed": 0},
        },
        "mitigations": {},
        "formats": {},
        "report": {},
        "studies": {
            "best": {
                "models": [MODEL],
                "transforms": ["none", "smooth", "hadamard"],
                "mitigations": ["rtn", "gptq"],
                "granularities": ["channel"],
                "formats": ["int4"],
                "race": {"budget": 4.5, "windows": "race-text"},
            }
        },
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("race") / "quantgrid")
    checkout.write_config(race_config(checkout.config()), "race")
    checkout.run("race")
    return checkout


def decisions(checkout: Checkout) -> list[dict[str, Any]]:
    """The decisions of the looks in their order."""
    paths = sorted((checkout.folder / RESULTS / "races" / "best" / MODEL).glob("*/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def recorded(checkout: Checkout) -> dict[Path, int]:
    """Map the record of each first look to its time; the first decision waits for all of them."""
    records = (checkout.folder / RESULTS / "digests" / "screen_cell").rglob("*.json")
    return {path: path.stat().st_mtime_ns for path in records}


def test_a_race_evaluates_what_it_keeps_and_says_so(finished: Checkout):
    found, results = decisions(finished), finished.folder / RESULTS
    assert found[-1]["ended"] and len(found) < 4
    assert all("/hadamard/" in name for name in found[-1]["survivors"])
    rows = list(csv.DictReader((results / "results.csv").open()))
    evaluated = {row["cell"] for row in rows if row["metric"] == "perplexity" and row["mitigation"] != "none"}
    raced = {row["cell"]: row for row in rows if row["metric"] == "race_kl_divergence"}
    assert len(raced) == 6 and len(evaluated) == len(found[-1]["survivors"]) < 6 and evaluated <= raced.keys()
    protocol = json.loads(next(iter(raced.values()))["protocol"])
    assert protocol["looks"] == [8, 16, 32] and protocol["skip_windows"] == 16
    page = (results / "report.html").read_text()
    assert f"of 6 recipes of {MODEL}" in page and "of the window evaluations were saved" in page
    assert not list(results.glob("quantized/**/model.safetensors")), "checkpoints go at the end"
    assert not [path for path in results.glob("evaluations/**/.*") if path.is_dir()], "nor do first looks leave any"


def test_the_decision_is_that_of_a_race_over_the_stored_shards(finished: Checkout):
    from quantgrid.evaluation.races import Conditions, cut, race

    [*_, last] = decisions(finished)
    looks = tuple(last["race"]["looks"])
    shards = {name: cut(losses, looks) for name, losses in last["losses"].items()}
    found = race(shards, Conditions(looks, 6))
    assert list(found.survivors) == last["survivors"]
    assert [decision.to_dict() for decision in found.decisions] == last["looks"]


def test_nothing_is_planned_afterwards_and_an_added_candidate_computes_its_own_shards_alone(
    finished: Checkout, tmp_path: Path
):
    assert finished.planned("race") == []
    checkout = finished.copy(tmp_path / "quantgrid")
    config = checkout.config("race")
    config["studies"]["best"]["transforms"].append("turned")
    config["transforms"]["turned"] = {"method": "random_hadamard", "seed": 1}
    checkout.write_config(config, "race")
    planned = checkout.planned("race")
    assert {axes["transform"] for rule, axes in planned if rule == "screen_cell"} == {"turned"}
    assert ("decide_race", "1") in {(rule, axes.get("look")) for rule, axes in planned}
    before = checkout.contents(RESULTS, "evaluations/**/*.json")
    checkout.run("race")
    now = checkout.contents(RESULTS, "evaluations/**/*.json")
    assert before.items() <= now.items() and decisions(checkout)[-1]["race"]["candidates"] == 8


def test_a_killed_race_ends_in_the_same_bytes(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "quantgrid")
    shutil.rmtree(checkout.folder / RESULTS)
    shutil.rmtree(checkout.folder / ".snakemake", ignore_errors=True)
    driver = checkout.start("race")
    wait_for(lambda: any((checkout.folder / RESULTS / "races").rglob("*.json")))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = recorded(checkout)
    checkout.run("race")
    assert len(before) == 6 and recorded(checkout) == before, "no first look is computed again"
    patterns = ("evaluations/**/*.json", "races/**/*.json", "results.csv", "studies/*.csv", "tables/*")
    assert checkout.contents(RESULTS, *patterns) == finished.contents(RESULTS, *patterns)


def test_a_race_that_prunes_leaves_recipes_unquantized_and_says_so(finished: Checkout, tmp_path: Path):
    """Round to nearest has over four times the error without a transform as behind a rotation."""
    checkout = finished.copy(tmp_path / "quantgrid")
    stored = list(checkout.folder.glob(f"{RESULTS}/**/none/gptq/**/*.json"))
    for path in stored:
        path.unlink()
    config = checkout.config("race")
    config["studies"]["best"]["race"]["prune"] = 4
    checkout.write_config(config, "race")
    checkout.run("race")
    assert stored and not any(path.exists() for path in stored)
    [last] = [found for found in decisions(checkout) if found["ended"] and found["race"].get("prune")]
    assert list(last["pruned"]) == [f"{MODEL}/none/gptq/channel/int4"]
    assert all("/hadamard/" in name for name in last["survivors"])
    page = (checkout.folder / RESULTS / "report.html").read_text()
    assert f"of 5 recipes of {MODEL}" in page and "there is no guarantee that the best is not one of them" in page


def test_first_looks_without_records_are_adopted(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "quantgrid")
    shutil.rmtree(checkout.folder / RESULTS / "digests" / "screen_cell")
    command = [sys.executable, "scripts/verify_results.py", "--configfile", "config/race.yaml", "--adopt"]
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True)
    assert "0 outputs damaged, 0 jobs without a record" in done.stdout, done.stdout + done.stderr
    assert checkout.planned("race") == []


def test_one_command_leads_from_a_model_to_the_line_that_exports_its_best_recipe(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "quantgrid")
    space = race_config(checkout.config())
    space["studies"] = {"w4a4": space["studies"]["best"]}
    (checkout.folder / "space.yaml").write_text(yaml.safe_dump(space))
    words = ["--model", MODEL, "--bits", "4.5", "--kind", "w4a4", "--space", "space.yaml", "--cores", "2"]
    command = [sys.executable, "scripts/best.py", "--configfile", "config/smoke.yaml", *words]
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"6 recipes of {MODEL} within 4.5 stored bits per weight are raced" in done.stdout
    assert "no export target holds hadamard/gptq/channel/int4" in done.stdout  # asymmetric inputs, online operations
    assert f"{RESULTS}/{MODEL}-w4a4/report.html" in done.stdout
