"""Jobs as forks of one process: streams, statuses and ends are those of a process of their own, and a run's results the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prepared import job_server

from quantgrid.drivers import marked_processes
from workflow import RESULT_FILES, ROOT, Checkout, one_cell

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
CLIENT = "import sys; from quantgrid import warm; sys.argv = sys.argv[2:]; raise SystemExit(warm.hand_over({address!r}))"


def wait_for(done: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the server of a driver listens; both end with the module's last test."""
    with job_server() as found:
        yield found
    wait_for(lambda: not Path(found).parent.exists(), "the server outlives its driver")


def client(address: str, script: Path, *words: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT.format(address=address), "-", str(script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **settings})


def script(folder: Path, content: str) -> Path:
    path = folder / "job.py"
    path.write_text(content)
    return path


def test_a_job_has_its_words_folder_environment_and_imports(address: str, tmp_path: Path):
    job = script(tmp_path, "import os, sys\nassert {'torch', 'transformers'} <= set(sys.modules) and __name__ == '__main__'\n"
                           "print(*sys.argv[1:], os.getcwd(), os.environ['MINE'], *map(os.environ.get, ('MALLOC_MMAP_MAX_', 'QUANTGRID_WARM')))\n")
    out, error = client(address, job, "one", "two words", MINE="here").communicate(timeout=120)
    assert (out, error) == (f"one two words {os.getcwd()} here None None\n", "")


@pytest.mark.parametrize("content, status, said", [
    ("", 0, ""), ("raise SystemExit", 0, ""), ("raise SystemExit(3)", 3, ""), ("raise SystemExit('why it failed')", 1, "why it failed\n"),
    ("raise ValueError('odd')", 1, "ValueError: odd\n"), ("import os; os.kill(os.getpid(), 9)", 1, "the job was killed\n"),
])
def test_a_job_ends_as_in_a_process_of_its_own(address: str, tmp_path: Path, content: str, status: int, said: str):
    job = client(address, script(tmp_path, content))
    error = job.communicate(timeout=120)[1]
    assert job.returncode == status and (error.endswith(said) if said else error == "")


def test_jobs_run_side_by_side_and_change_nothing_for_each_other(address: str, tmp_path: Path):
    content = "import os, sys, time, torch\nseen = torch.get_default_dtype()\ntorch.set_default_dtype(torch.float64)\nopen(sys.argv[1], 'x')\n" \
              "while not os.path.exists(sys.argv[2]):\n    time.sleep(0.01)\nprint(seen)\n"
    job, first, second = script(tmp_path, content), str(tmp_path / "first"), str(tmp_path / "second")
    jobs = [client(address, job, *words) for words in ((first, second), (second, first))]
    assert [each.communicate(timeout=120)[0] for each in jobs] == ["torch.float32\n"] * 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_ends_with_the_process_that_asked_for_it(address: str, tmp_path: Path, how: signal.Signals):
    told = tmp_path / "told"
    job = script(tmp_path, f"import os, time\nopen({str(told)!r} + '-', 'w').write(str(os.getpid()))\nos.rename({str(told)!r} + '-', {str(told)!r})\n"
                           "time.sleep(600)\n")
    asked = client(address, job)
    wait_for(told.exists, "the job does not start")
    fork = int(told.read_text())
    assert psutil.pid_exists(fork)
    asked.send_signal(how)
    asked.communicate(timeout=60)
    wait_for(lambda: not psutil.pid_exists(fork), "the job goes on")


def test_without_a_server_a_job_says_so(tmp_path: Path):
    job = client(str(tmp_path / "nobody"), script(tmp_path, ""))
    error = job.communicate(timeout=60)[1]
    assert job.returncode == 1 and "the process that runs jobs has ended" in error and "start the run again" in error


@pytest.mark.parametrize("options, named", [(["--profile", "slurm"], "profile slurm"), (["--sdm", "conda"], "--sdm")])
def test_a_warm_start_is_refused_where_jobs_are_others(tmp_path: Path, options: list[str], named: str):
    command = [sys.executable, str(ROOT / "scripts" / "run_workflow.py"), "--configfile", str(ROOT / "config" / "smoke.yaml"), "--warm", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"not with {named}" in done.stderr


@pytest.mark.workflow
def test_a_warm_run_gives_the_same_bytes_and_leaves_no_process(tmp_path: Path):
    made = {}
    for name, options in {"fresh": [], "warm": ["--warm"]}.items():
        checkout = one_cell(Checkout.make(tmp_path / name))
        checkout.run("smoke", *options)
        made[name] = checkout.contents("results-smoke", *RESULT_FILES)
        wait_for(lambda folder=checkout.folder: not marked_processes(str(folder)), "a process of the run goes on")
    assert made["warm"] == made["fresh"] and any(path.startswith("evaluations/") for path in made["warm"])
