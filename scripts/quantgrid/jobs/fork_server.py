"""Fork server: imports torch, transformers and the library once and forks one process per local job.

``run_workflow.py`` starts it. `run_job.py` sends it its arguments, folder, environment and
standard streams and exits with the status of the fork; if `run_job.py` is interrupted or dies, the
fork is interrupted too. Forks share imports only: each computes the same bytes as a fresh process.
A job of another environment or machine, or whose server has ended, runs in a fresh interpreter.

One server is enough for several GPUs: it never initializes CUDA, which does not survive a fork. A
fork reserves a free GPU (:mod:`..machine.gpus`), sees no other, and initializes CUDA itself.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import runpy
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from ..ground.places import LIBRARY, SCRIPTS
from ..machine.gpus import driver_initialized
from ..plan.steps import OUTPUTS, REPORTS
from .fork_client import DECLINED, LENGTH, SERVED, SOCKET, STREAMS, address, identity, user

PRELOADED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy",
    "pandas",
    "scipy.linalg",
    "safetensors.torch",
    "threadpoolctl",
    "torch",
    "tqdm",
    "transformers",
    "transformers.models.llama.modeling_llama",
)
# read by BLAS libraries once, when they are loaded
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PATIENCE = 20.0  # grace period of an interrupted fork in seconds


def start(environment: dict[str, str]) -> None:
    """Start the server, with ``environment`` added, as a child of this process, which then becomes
    the driver; jobs find it by their environment."""
    name = f"quantgrid-{os.getpid()}-{secrets.token_hex(8)}"
    # Query CUDA through NVML: the CUDA runtime, once initialized, does not survive a fork.
    settings = {**os.environ, **environment, **dict.fromkeys(THREADS, "1"), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address(name))
        listener.listen(128)  # jobs may connect before the imports are done
        command = [sys.executable, str(SCRIPTS / "serve_jobs.py"), str(listener.fileno()), str(os.getpid())]
        # A new session, so that Ctrl-C reaches only the driver.
        subprocess.Popen(
            command, pass_fds=[listener.fileno()], env=settings, stdin=subprocess.DEVNULL, start_new_session=True
        )
    os.environ |= {SOCKET: name, SERVED: identity()}


def why_not() -> str:
    """Name what keeps this platform from forking jobs; empty if it can."""
    return "" if sys.platform == "linux" else f"{platform.system()}, where a process with torch loaded cannot be forked"


def in_fork() -> bool:
    """Check whether this process is a fork of the server."""
    return _Job.started


class _Job(socketserver.BaseRequestHandler):
    """One job in its fork."""

    started = ended = False

    def handle(self) -> None:
        _Job.started = True
        os.setsid()
        self.server.socket.close()
        length, streams, _, _ = socket.recv_fds(self.request, LENGTH.size, len(STREAMS))
        if not streams:
            return  # its client has died already
        for stream, number in zip(streams, STREAMS, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        with self.request.makefile("rb") as file:
            job = json.loads(file.read(*LENGTH.unpack(length)))
        if self.server.declines:
            self.request.sendall(DECLINED)
            os._exit(0)
        threading.Thread(target=self._end_with_client, daemon=True).start()
        status = _run(**job)
        self.ended = True
        with suppress(OSError):  # the client may have died
            self.request.sendall(bytes([status]))
        os._exit(0)  # the client waits for this: memory is freed before its connection closes

    def _end_with_client(self) -> None:
        """Interrupt this job and its children, as Ctrl-C would, when the client asks or dies; kill
        the processes that survive."""
        if not self.request.recv(1) and not self.ended:
            os.killpg(0, signal.SIGINT)
            time.sleep(PATIENCE)
            os.killpg(0, signal.SIGKILL)


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """Run the script ``argv`` in this process as Python would; returns its exit status."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if name not in (SOCKET, SERVED)})
    sys.argv = argv
    status = 0
    try:
        _limit_threads(environment)
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _limit_threads(environment: dict[str, str]) -> None:
    """Set the number of threads of every loaded BLAS from ``environment``, if Snakemake sets it."""
    from threadpoolctl import threadpool_limits

    if THREADS[0] in environment:
        threadpool_limits(int(environment[THREADS[0]]))


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Server that forks for every connection of this user until the driver ends."""

    max_children = 1 << 16  # Snakemake limits the number of parallel jobs
    block_on_close = False
    declines = False  # whether forks would find CUDA initialized

    def __init__(self, listener: socket.socket, driver: int) -> None:
        super().__init__(listener.getsockname(), _Job, bind_and_activate=False)
        self.socket.close()
        self.socket, self.driver = listener, driver

    def verify_request(self, request: socket.socket, client_address: object) -> bool:
        return user(request) == os.getuid()

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.driver:
            raise SystemExit


@contextmanager
def _discarding_messages() -> Iterator[None]:
    """Discard what is written to standard error; a traceback of an exception comes later and is not.

    Imports warn there, in a fresh interpreter into the log of its job.
    """
    kept = os.dup(STREAMS[2])
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), STREAMS[2])
    try:
        yield
    finally:
        os.dup2(kept, STREAMS[2])
        os.close(kept)


def library_modules() -> list[str]:
    """List the modules of the library that ``run_job.py`` and the scripts of the rules import at their top."""
    scripts = [SCRIPTS / f"{rule}.py" for rule in (*OUTPUTS, *REPORTS)]
    return list(dict.fromkeys([f"{__package__}.rule_job", *(name for script in scripts for name in _imported(script))]))


def _imported(script: Path) -> Iterator[str]:
    """Modules of the library that the import statements at the top of a script name."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in (name for name in names if name.partition(".")[0] == LIBRARY.name):
            path = SCRIPTS.joinpath(*name.split("."))
            if path.is_dir() or path.with_suffix(".py").is_file():
                yield name


def serve(descriptor: int, driver: int, library: Iterable[str] = ()) -> None:
    """Import the modules that jobs need, those of the ``library`` last, then serve jobs at the listening
    socket ``descriptor`` until ``driver``, the parent process, ends."""
    with _discarding_messages():
        for name in (*PRELOADED, *library):
            if os.getppid() != driver:
                return
            import_module(name)
    with _Server(socket.socket(fileno=descriptor), driver) as server:
        server.declines = driver_initialized()
        server.serve_forever(poll_interval=0.2)
