"""A killed driver, a killed job, a model with NaN: what was computed stays, what is wrong is said,
the rest goes on."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkouts import RESULT_FILES, Checkout, running_jobs
from kill_at_random import kills

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
RESULTS = "results-smoke"


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The smoke config with two small studies: five quantized cells."""
    config["studies"]["methods"] |= {
        "mitigations": ["rtn", "gptq", "low-rank"],
        "also": [{"transforms": ["hadamard"], "mitigations": ["gptq"]}],
    }
    config["transforms"]["hadamard"] = {"method": "random_hadamard"}
    config["studies"] = {"methods": config["studies"]["methods"]}
    config["report"] = {}
    return config


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("uninterrupted") / "quantgrid")
    checkout.write_config(small(checkout.config()), "smoke")
    checkout.run("smoke")
    return checkout


def fresh(uninterrupted: Checkout, folder: Path) -> Checkout:
    """A checkout of the same config in which nothing ran yet."""
    checkout = Checkout.make(folder)
    shutil.copy(uninterrupted.folder / "config" / "smoke.yaml", checkout.folder / "config" / "smoke.yaml")
    return checkout


def kill_driver_when(checkout: Checkout, reached: Callable[[], bool], *options: str) -> None:
    """Kill the driver with -9, one of its jobs held so that it is certainly still there for the
    next run."""
    driver = checkout.start("smoke", *options)
    wait_for(lambda: reached() and any(stopped(pid) for pid in running_jobs(checkout.folder)))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def stopped(pid: int, with_signal: int = signal.SIGSTOP) -> bool:
    """Send a signal to a job; False where it had just ended."""
    try:
        os.kill(pid, with_signal)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("quantized", []),
        pytest.param("models", ["--cold"], marks=pytest.mark.nightly),
        pytest.param("evaluations", ["--cold"], marks=pytest.mark.nightly),
    ],
)
def test_a_killed_driver_leaves_no_trace_in_the_results(
    uninterrupted: Checkout, tmp_path: Path, folder: str, options: list[str]
):
    """kill -9 in three stages of the run: the next run ends the orphans, needs no manual unlock,
    and ends in the same bytes."""
    checkout = fresh(uninterrupted, tmp_path / "quantgrid")
    kill_driver_when(checkout, lambda: any((checkout.folder / RESULTS / folder).rglob("*.*")), *options)
    assert running_jobs(checkout.folder), "the jobs of a killed driver go on; the next run has to end them"
    orphans = set(running_jobs(checkout.folder))
    output = checkout.run("smoke")
    assert "of a run that was killed" in output
    assert not orphans & set(running_jobs(checkout.folder))
    assert checkout.contents(RESULTS, *RESULT_FILES) == uninterrupted.contents(RESULTS, *RESULT_FILES)


def test_a_killed_job_fails_alone_and_the_next_run_completes(uninterrupted: Checkout, tmp_path: Path):
    checkout = fresh(uninterrupted, tmp_path / "quantgrid")
    driver = checkout.start("smoke")
    wait_for(lambda: any(stopped(pid, signal.SIGKILL) for pid in running_jobs(checkout.folder, "quantize_model")))
    assert driver.wait(timeout=600) != 0
    results = checkout.folder / RESULTS
    assert list(results.glob("evaluations/*/*/*/*/*/perplexity/*/*.json")), "the other cells go on"
    partial = (results / "report.partial.html").read_text()
    assert "not computed" in partial
    checkout.run("smoke")
    assert not (results / "report.partial.html").exists()
    assert checkout.contents(RESULTS, *RESULT_FILES) == uninterrupted.contents(RESULTS, *RESULT_FILES)


@pytest.mark.nightly
@pytest.mark.parametrize("options", [["--cold"], []], ids=["cold", "warm"])
def test_three_kills_at_random_moments_leave_the_same_bytes(
    uninterrupted: Checkout, tmp_path: Path, options: list[str]
):
    """The short version of `make stress`."""
    checkout = fresh(uninterrupted, tmp_path / "quantgrid")
    expected = uninterrupted.contents(RESULTS, *RESULT_FILES)
    killed = [*kills(checkout, "smoke", 3, 3, 12, expected, RESULTS, *options)]
    assert len(killed) == 3


@pytest.mark.nightly
@pytest.mark.timeout(10800)
def test_thirty_kills_of_the_whole_smoke_run_leave_the_same_bytes(smoke: Checkout, tmp_path: Path):
    """`make stress`, against the results of a run with a warm start."""
    checkout = Checkout.make(tmp_path / "quantgrid")
    assert len([*kills(checkout, "smoke", 30, 1, 20, smoke.contents(RESULTS, *RESULT_FILES), RESULTS)]) == 30


def test_nan_in_one_model_fails_its_cells_alone(uninterrupted: Checkout, tmp_path: Path):
    """The cells of the broken model are results with a reason; those of the sound one, the tables
    and the report are there."""
    checkout = fresh(uninterrupted, tmp_path / "quantgrid")
    source = checkout.folder / "tests" / "data" / "tiny-llama"
    broken = checkout.folder / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = checkout.config()
    config["models"]["broken"] = {"source": "local", "path": "broken"}
    config["studies"]["methods"]["models"] = ["reference-1m-planted", "broken"]
    checkout.write_config(config, "smoke")
    output = checkout.run("smoke")
    assert "the result is a failure: " in output and re.search(r"cells \(\d+ failed\)", output), (
        "said while it runs, not in the report alone"
    )
    rows = list(csv.DictReader((checkout.folder / RESULTS / "results.csv").open()))
    assert {row["status"] for row in rows if row["model"] == "reference-1m-planted"} == {"ok"}
    failed = [row for row in rows if row["model"] == "broken"]
    assert {row["status"] for row in failed} == {"failed"}
    assert all("NaN" in row["reason"] for row in failed)
    assert "failed" in (checkout.folder / RESULTS / "tables" / "methods.md").read_text()
    assert "holds NaN or infinity" in (checkout.folder / RESULTS / "report.html").read_text()


def test_a_second_driver_in_the_same_folder_is_told_so(uninterrupted: Checkout, tmp_path: Path):
    checkout = fresh(uninterrupted, tmp_path / "quantgrid")
    driver = checkout.start("smoke")
    wait_for(lambda: bool(running_jobs(checkout.folder)))
    second = subprocess.run(checkout.command("smoke"), cwd=checkout.folder, capture_output=True, text=True, timeout=120)
    assert second.returncode != 0 and f"{RESULTS} is in use by process {driver.pid} on " in second.stderr
    assert "wait for that run, or end it with Ctrl-C or kill -INT" in second.stderr
    assert not second.stdout and "Traceback" not in second.stderr
    assert driver.wait(timeout=600) == 0
    assert checkout.contents(RESULTS, *RESULT_FILES) == uninterrupted.contents(RESULTS, *RESULT_FILES)
