"""Jobs as forks of one process: streams, statuses and ends are those of separate processes, and a
run's results the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from prepared import job_server

import run_workflow
from checkouts import RESULT_FILES, ROOT, Checkout, one_cell
from in_process import run_script
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs import fork_client, fork_server
from quantgrid.jobs.drivers import marked_processes
from quantgrid.jobs.fork_server import library_modules
from quantgrid.machine import gpus
from quantgrid.reporting.data.costs import read_one

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
CLIENT = (
    "import sys; from quantgrid.jobs import fork_client; sys.argv = sys.argv[2:]; raise "
    "SystemExit(fork_client.hand_over(fork_client.connect()))"
)
Served = dict[str, str]  # the environment by which jobs find their server


def wait_for(done: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The server of a driver; both end with the module's last test."""
    with job_server() as found:
        yield found
    wait_for(
        lambda: found[fork_client.SOCKET] not in Path("/proc/net/unix").read_text(), "the server outlives its driver"
    )


def client(served: Served, script: Path, *words: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT, "-", str(script), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **served, **settings}
    )


def script(folder: Path, content: str) -> Path:
    path = folder / "job.py"
    path.write_text(content)
    return path


def test_the_client_imports_little():
    """Every job of a run starts it."""
    code = "import sys, run_job; print(*sorted(name for name in sys.modules if name.startswith('quantgrid.')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    expected = "quantgrid.ground quantgrid.ground.places quantgrid.jobs quantgrid.jobs.fork_client"
    assert done.stdout.strip() == expected


def test_a_job_has_its_words_folder_environment_and_imports(served: Served, tmp_path: Path):
    job = script(
        tmp_path,
        "import os, sys\nassert {'torch', 'transformers'} <= set(sys.modules) and __name__ == '__main__'\n"
        "print(*sys.argv[1:], os.getcwd(), os.environ['MINE'], *map(os.environ.get, ('MALLOC_MMAP_MAX_', "
        "*sys.argv[1:])))\n",
    )
    words = (fork_client.SOCKET, fork_client.SERVED, "two words")
    out, error = client(served, job, *words, MINE="here").communicate(timeout=120)
    assert (out, error) == (f"{' '.join(words)} {os.getcwd()} here None None None None\n", "")


def test_a_job_finds_the_library_loaded_by_a_server_of_one_thread(served: Served, tmp_path: Path):
    """Modules that the script of a rule imports at its top are loaded.

    A process with several threads cannot be forked safely; that of the allocator of pyarrow, which pandas
    imports, holds no lock of Python.
    """
    loaded = library_modules()
    assert {"quantgrid.jobs.rule_job", "quantgrid.quantization.checkpoints", "quantgrid.reporting.data.races"} <= {
        *loaded
    }
    content = "import os, sys\nprint([name for name in sys.argv[1:] if name not in sys.modules])\n"
    content += "tasks = f'/proc/{os.getppid()}/task'\n"
    content += "names = [open(f'{tasks}/{task}/comm').read().strip() for task in os.listdir(tasks)]\n"
    content += "print(len([name for name in names if name != 'jemalloc_bg_thd']))\n"
    assert client(served, script(tmp_path, content), *loaded).communicate(timeout=120) == ("[]\n1\n", "")


@pytest.mark.parametrize(
    "content, status, said",
    [
        ("", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why it failed')", 1, "why it failed\n"),
        ("raise ValueError('odd')", 1, "ValueError: odd\n"),
        ("import os; os.kill(os.getpid(), 9)", 137, "the job was killed\n"),
    ],
)
def test_a_job_ends_as_in_a_process_of_its_own(served: Served, tmp_path: Path, content: str, status: int, said: str):
    job = client(served, script(tmp_path, content))
    error = job.communicate(timeout=120)[1]
    assert job.returncode == status and (error.endswith(said) if said else error == "")


def test_jobs_run_side_by_side_and_change_nothing_for_each_other(served: Served, tmp_path: Path):
    content = (
        "import os, sys, time, torch\nseen = "
        "torch.get_default_dtype()\ntorch.set_default_dtype(torch.float64)\nopen(sys.argv[1], 'x')\n"
        "while not os.path.exists(sys.argv[2]):\n    time.sleep(0.01)\nprint(seen)\n"
    )
    job, first, second = script(tmp_path, content), str(tmp_path / "first"), str(tmp_path / "second")
    jobs = [client(served, job, *words) for words in ((first, second), (second, first))]
    assert [each.communicate(timeout=120)[0] for each in jobs] == ["torch.float32\n"] * 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_job_clears_up_and_ends_with_the_process_that_asked_for_it(
    served: Served, tmp_path: Path, how: signal.Signals
):
    """Processes that the job started end too. After SIGINT the client waits for the clean-up."""
    noted, cleared = tmp_path / "noted", tmp_path / "cleared"
    job = script(
        tmp_path,
        f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
with open({str(noted)!r} + "-", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(noted)!r} + "-", {str(noted)!r})
try:
    child.wait()
    time.sleep(600)
finally:
    time.sleep(0.5)
    open({str(cleared)!r}, "w")
""",
    )
    asked = client(served, job)
    wait_for(noted.exists, "the job does not start")
    processes = [int(number) for number in noted.read_text().split()]
    assert all(map(psutil.pid_exists, processes))
    asked.send_signal(how)
    asked.communicate(timeout=60)
    assert cleared.exists() or how != signal.SIGINT
    wait_for(lambda: cleared.exists() and not any(map(psutil.pid_exists, processes)), "the job goes on")


def test_a_job_that_takes_no_notice_is_killed(served: Served, tmp_path: Path):
    noted = tmp_path / "noted"
    job = script(
        tmp_path,
        "import os, signal, sys, time\nfrom quantgrid.jobs import fork_server\n"
        "fork_server.PATIENCE = 0.1\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)\n",
    )
    asked = client(served, job, str(noted))
    wait_for(lambda: noted.exists() and noted.read_text(), "the job does not start")
    asked.kill()
    asked.communicate(timeout=60)
    wait_for(lambda: not psutil.pid_exists(int(noted.read_text())), "the job goes on")


def test_a_server_that_ends_before_it_has_read_a_job_kills_it(served: Served, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0quantgrid-test-{os.getpid()}")
        listener.listen()
        job = client(served, script(tmp_path, ""), **{fork_client.SOCKET: f"quantgrid-test-{os.getpid()}"})
        listener.accept()[0].close()
    error = job.communicate(timeout=60)[1]
    assert (job.returncode, error) == (137, "the job was killed\n")


@pytest.mark.parametrize(
    "change, said",
    [
        ({fork_client.SOCKET: "nobody"}, "running this job in a fresh interpreter"),
        ({fork_client.SERVED: "another environment"}, ""),
        ({}, None),
    ],
    ids=["no server", "another environment", "served"],
)
def test_a_job_that_no_server_is_there_for_runs_in_its_own_process(
    served: Served, tmp_path: Path, change: dict[str, str], said: str | None
):
    """`run_job.py` gets a rule that does not exist; the traceback shows which process failed, and
    what it had loaded."""
    command = [sys.executable, str(ROOT / "scripts" / "run_job.py"), "nothing", "--spec", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **served, **change})
    assert done.returncode == 1 and "nothing.py" in done.stderr
    assert ("fork_server.py" in done.stderr) == (said is None) and (said or "") in done.stderr


@pytest.mark.parametrize(
    "options, named",
    [
        (["--profile", "slurm"], "profile slurm"),
        (["--sdm", "conda"], "--sdm"),
        (["--sdm=conda"], "--sdm"),
        (["--executor=slurm"], "--executor"),
    ],
)
def test_a_warm_start_is_refused_where_jobs_are_others(tmp_path: Path, options: list[str], named: str):
    done = run_script(
        "run_workflow", "--configfile", ROOT / "config" / "smoke.yaml", "--warm", *options, folder=tmp_path
    )
    assert done.returncode == 1 and f"does not work with {named}" in done.stderr


@pytest.mark.parametrize(
    "profile, options, reason",
    [
        ("default", [], ""),
        ("default", ["--touch"], ""),
        ("gpus", [], ""),
        ("s3", [], ""),
        ("kubernetes", [], "profile kubernetes"),
        ("slurm", [], "profile slurm"),
        ("slurm-gpu", [], "profile slurm-gpu"),
        ("default", ["--workflow-profile", "mine"], "--workflow-profile"),
    ],
)
def test_every_profile_that_runs_jobs_here_starts_warm(profile: str, options: list[str], reason: str):
    assert run_workflow.why_cold(profile, options) == reason


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments with which servers would have been started."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(fork_server, "start", found.append)
    return found


def test_where_jobs_cannot_be_forked_they_start_cold_and_the_run_says_so(
    started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_workflow.warm_up("default", [], {"MARK": "1"})
    assert [entry["MARK"] for entry in started] == ["1"] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    run_workflow.warm_up("default", [], {})
    assert len(started) == 1 and "jobs start cold" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--warm requires"):
        run_workflow.check_warm("default", [])


DECLINING = (
    "import sys; from quantgrid.jobs import fork_server; fork_server.PRELOADED = (); "
    "fork_server.driver_initialized = lambda: True; fork_server.serve(*map(int, sys.argv[1:]))"
)


def test_a_server_with_cuda_initialized_runs_no_job(served: Served, tmp_path: Path):
    """CUDA does not survive a fork; the client learns so before its script has begun."""
    name = f"quantgrid-test-declining-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        command = [sys.executable, "-c", DECLINING, str(listener.fileno()), str(os.getpid())]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], env=ENVIRONMENT)
    try:
        job = client(served, script(tmp_path, "print('began')"), "x" * 100000, **{fork_client.SOCKET: name})
        out, error = job.communicate(timeout=120)
    finally:
        server.kill()
        server.wait()
    assert (job.returncode, out) == (0, "") and "initialized CUDA in the fork server" in error


@pytest.mark.parametrize("answer, initialized", [(3, False), (0, True), (100, True)])
def test_cuda_counts_as_initialized_once_its_driver_answers(
    answer: int, initialized: bool, monkeypatch: pytest.MonkeyPatch
):
    assert not gpus.driver_initialized(), "no process of the tests uses CUDA"
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(cuDeviceGetCount=lambda count: answer))
    assert gpus.driver_initialized() == initialized


CARD = """
import os, sys, time, torch
from quantgrid.machine.gpus import choose
assert not torch.cuda.is_initialized()
choose(sys.argv[1])
open(sys.argv[2], 'x')
while not os.path.exists(sys.argv[3]):
    time.sleep(0.01)
print(os.environ['CUDA_VISIBLE_DEVICES'])
"""


def test_forks_of_one_server_reserve_different_gpus(served: Served, tmp_path: Path):
    for number in range(2):
        (tmp_path / f"nvidia{number}").touch()
    cards, first, second = (str(tmp_path / name) for name in ("nvidia[0-9]*", "first", "second"))
    job = script(tmp_path, CARD)
    jobs = [client(served, job, cards, *words, TMPDIR=str(tmp_path)) for words in ((first, second), (second, first))]
    assert sorted(each.communicate(timeout=120)[0] for each in jobs) == ["0\n", "1\n"]
    (tmp_path / "third").touch()
    alone = client(served, job, cards, str(tmp_path / "fourth"), str(tmp_path / "third"), TMPDIR=str(tmp_path))
    assert alone.communicate(timeout=120)[0] == "0\n", "free again"


@pytest.mark.slow
@pytest.mark.workflow
def test_a_warm_run_gives_the_same_bytes_and_leaves_no_process(tmp_path: Path):
    """Every job of either run has recorded its time and memory, by the process that computed.

    The client that waits for a job holds no library in its memory, and the processor time of the server
    before the fork is not the job's.
    """
    made, costs = {}, {}
    for name, options in {"cold": ["--cold"], "warm": []}.items():
        checkout = one_cell(Checkout.make(tmp_path / name))
        checkout.write_config({**checkout.config(), "threads": {"default": 2, "evaluate_perplexity": 1}}, "smoke")
        checkout.run("smoke", *options)
        made[name] = checkout.contents("results-smoke", *RESULT_FILES)
        costs[name] = {
            path.relative_to(checkout.folder): read_one(path)
            for path in (checkout.folder / "results-smoke" / "benchmarks").rglob("*.tsv")
        }
        wait_for(lambda folder=checkout.folder: not marked_processes(str(folder)), "a process of the run goes on")
        starts = {path.read_text().split()[-1] for path in checkout.folder.glob("results-smoke/benchmarks/**/*.tsv")}
        assert starts == {name}
        logs = list((checkout.folder / "results-smoke" / "logs").rglob("*.log"))
        assert len(costs[name]) == len(logs), "one record for each log"
    assert made["warm"] == made["cold"] and any(path.startswith("evaluations/") for path in made["warm"])
    assert costs["warm"].keys() == costs["cold"].keys()
    for path, warm in costs["warm"].items():
        if path.parts[2] in ("quantize_model", "evaluate_perplexity"):
            assert 100 < warm["max_rss_mb"] < 4000
            threads = 2 if path.parts[2] == "quantize_model" else 1
            assert 0 < warm["cpu_seconds"] <= threads * warm["seconds"] + 0.5, "the server imports for longer"
