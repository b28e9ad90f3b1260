"""A real Slurm on this machine: the results of a local run, through jobs that are cancelled, over
their memory, or left by a killed driver. Tables, figures and pages are made by the driver, as in
a local run, and are not asked for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkouts import ROOT, Checkout, one_cell
from quantgrid.jobs.drivers import queued

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
RESULTS = "results-smoke"
TABLE = f"{RESULTS}/results.csv"
OPTIONS = ("--jobs", "4", "--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5")
CONFIGURATION = [Path("/etc/slurm") / name for name in ("slurm.conf", "gres.conf")]


def missing() -> str:
    """Name the programs of Slurm that this machine lacks; empty if it has all."""
    programs = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    if programs:
        return f"{', '.join(programs)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    if not find_spec("snakemake_executor_plugin_slurm"):
        return "snakemake-executor-plugin-slurm is not installed"
    return "" if os.getuid() == 0 else "only root can start slurmd"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Slurm's folder (logs, state) while a node of this test runs; the daemons are ended by
    their process ids."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        [ROOT / "tests" / "slurm" / "start.sh", folder], capture_output=True, text=True, timeout=300
    )
    try:
        if started.returncode == 2:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield folder
    finally:
        pids = [int(pid) for pid in (folder / "pids").read_text().split()] if (folder / "pids").is_file() else []
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        if started.returncode != 2:
            for path in CONFIGURATION:
                path.unlink(missing_ok=True)


@pytest.fixture
def checkout(cluster: Path, tmp_path: Path) -> Checkout:
    return one_cell(Checkout.make(tmp_path / "quantgrid"))


def running(checkout: Checkout, rule: str) -> list[str]:
    """Ids of the Slurm jobs of a checkout that run and whose comment names ``rule``."""
    done = subprocess.run(
        ["squeue", "--noheader", "--states", "RUNNING", "--format", "%A|%k|%Z"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return [job for job, comment, folder in lines if folder == str(checkout.folder) and rule in comment]


def wait_for(condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def is_that_of(checkout: Checkout, expected: dict[str, bytes]) -> bool:
    """Whether every evaluation, the study and results.csv have the bytes of a local run."""
    patterns = ("evaluations/**/*.json", "studies/*.csv", "results.csv")
    made = checkout.contents(RESULTS, *patterns)
    return made == {name: expected[name] for name in made} and made.keys() >= {
        name for name in expected if name.startswith(("evaluations/", "studies/"))
    } | {"results.csv"}


def log_of(checkout: Checkout) -> str:
    return (checkout.folder / "smoke.log").read_text()[-6000:]


def names(checkout: Checkout) -> list[str]:
    """Names in the queue of the Slurm jobs of a checkout, ended ones too."""
    command = ["squeue", "--noheader", "--states", "all", "--format", "%j|%Z"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return sorted(name for name, folder in lines if folder == str(checkout.folder))


def test_slurm_gives_the_bytes_of_a_local_run(checkout: Checkout, one_cell_results: dict[str, bytes]):
    """Its jobs are called after what they do, and the log of the run says what concerns a reader."""
    output = checkout.run("smoke", "--profile", "slurm", *OPTIONS, TABLE)
    submitted = output.count("has been submitted with SLURM jobid")
    assert submitted == 1 + 1 + 1 + 1 + 2, "gate, calibration, transform, reference, two for the cell"
    model = "reference-1m-planted"
    cells = [f"cell:{model}/{cell}" for cell in ("none/gptq/channel/int4", "none/none/-/bf16")]
    rest = [f"calibrate_model:{model}/default", f"evaluate_reference:{model}/docs/0-16"]
    rest += [f"fit_transform:{model}/none/any", f"gate_model:{model}"]
    assert names(checkout) == sorted([*cells, *rest])
    assert re.search(rf"\(log: \S+/slurm_logs/\w+/{model}/none/gptq/channel/int4/\d+\.log\)", output)
    assert "trying to guess" not in output and "default account" in output
    assert re.search(r"(\d+)/\1 steps, 2/2 cells\b(?!.*steps)", output, re.DOTALL)
    assert is_that_of(checkout, one_cell_results)
    assert not queued(str(checkout.folder))


@pytest.mark.nightly
def test_a_cancelled_job_and_one_over_its_memory_are_submitted_again(
    checkout: Checkout, one_cell_results: dict[str, bytes], cluster: Path
):
    """The reference is cancelled while it runs; calibration is at first given less than importing
    torch takes, then enough."""
    driver = checkout.start(
        "smoke",
        "--profile",
        "slurm",
        *OPTIONS,
        "--set-resources",
        "calibrate_model:mem_mb=attempt*1000-750",
        "--",
        TABLE,
    )
    wait_for(lambda: running(checkout, "evaluate_reference"))
    subprocess.run(["scancel", *running(checkout, "evaluate_reference")], check=True)
    assert driver.wait(timeout=800) == 0, log_of(checkout)
    failures = re.findall(r"SLURM status is: '(\w+)", (checkout.folder / "smoke.log").read_text())
    assert len(failures) >= 2 and "CANCELLED" in failures, failures
    assert "exceeded memory limit" in (cluster / "log" / "slurmd.log").read_text()
    assert is_that_of(checkout, one_cell_results)


@pytest.mark.nightly
def test_jobs_of_a_killed_driver_are_cancelled_and_the_next_run_completes(
    checkout: Checkout, one_cell_results: dict[str, bytes]
):
    """With the profile for GPUs, of which the node has two that are none: each job is given one."""
    driver = checkout.start("smoke", "--profile", "slurm-gpu", *OPTIONS, TABLE)
    wait_for(lambda: running(checkout, "calibrate_model"))
    [job] = running(checkout, "calibrate_model")
    assert re.search(
        "gres[:/]gpu[:=]1",
        subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout,
    )
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert queued(str(checkout.folder)), "the jobs go on without their driver"
    output = checkout.run("smoke", "--profile", "slurm-gpu", *OPTIONS, TABLE)
    assert "Slurm jobs of a run that was killed" in output
    assert is_that_of(checkout, one_cell_results)
    assert not queued(str(checkout.folder))
