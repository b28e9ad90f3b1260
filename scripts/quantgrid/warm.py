"""Jobs without start-up: a server that has imported torch and transformers forks a process for every job of a run on this machine.

``run_workflow.py --warm`` starts it. `run_job.py` hands its words, folder, environment and standard streams to it and ends as the fork ends, by its
status; where `run_job.py` is interrupted or gone, the fork is interrupted, too. Imports are all that forks share: each computes what a fresh process
would, to the same bytes. A job of another environment or machine, or whose server has ended, has imports of its own instead.

Snakemake's benchmark files measure the process that it starts, so they hold no processor time and memory of a fork; its log does.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import secrets
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from .errors import ConfigError

SOCKET, SERVED = "QUANTGRID_WARM", "QUANTGRID_WARM_FOR"  # variables that tell a run's jobs where the server listens, and to whom
PRELOADED = ("numpy", "scipy.linalg", "safetensors.torch", "threadpoolctl", "torch", "tqdm", "transformers",
             "transformers.models.llama.modeling_llama")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # what a BLAS reads once, when it is loaded
PATIENCE = 20.0  # seconds that an interrupted fork has to clear up
_SCRIPTS = Path(__file__).resolve().parents[1]
_STREAMS = (0, 1, 2)
_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")


def start(environment: dict[str, str]) -> None:
    """Start the server, with ``environment`` added to its own, as a child of this process, which is about to become the driver; jobs find it by
    their environment."""
    if sys.platform != "linux":
        raise ConfigError("--warm needs Linux: elsewhere a process with torch loaded cannot safely be forked")
    name = f"quantgrid-{os.getpid()}-{secrets.token_hex(8)}"
    # CUDA is asked through its library of facts: the runtime, once asked, does not survive a fork.
    settings = {**os.environ, **environment, **dict.fromkeys(THREADS, "1"), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_address(name))
        listener.listen(128)  # jobs may come before the imports are done
        command = [sys.executable, str(_SCRIPTS / "serve_jobs.py"), str(listener.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C is for the driver.
        subprocess.Popen(command, pass_fds=[listener.fileno()], env=settings, stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ |= {SOCKET: name, SERVED: _identity()}


def _address(name: str) -> str:
    """The address of a server: in Linux's abstract name space, so that no file is left of it."""
    return f"\0{name}"


def _identity() -> str:
    """The machine, the Python environment and the scripts that this process runs: a fork is no replacement for a job of others."""
    return f"{platform.node()} {sys.prefix} {_SCRIPTS}"


def _user(connection: socket.socket) -> int:
    """The user of the process at the other end."""
    return _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]


def connect() -> socket.socket | None:
    """A connection to the server that this job is to be forked from; None where there is none for it."""
    if os.environ.get(SERVED) != _identity():
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(os.environ[SOCKET]))
        if _user(connection) == os.getuid():
            return connection
    except OSError:
        pass
    print("the process that jobs are forked from has ended: this one has imports of its own", file=sys.stderr)
    return None


def hand_over(connection: socket.socket) -> int:
    """Let the server run this process's job; its exit status, when it has ended."""
    words = json.dumps({"argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    status = b""
    with connection, connection.makefile("rb") as answer, suppress(OSError):
        try:
            socket.send_fds(connection, [_LENGTH.pack(len(words))], _STREAMS)
            connection.sendall(words)
            status = answer.read()
        except KeyboardInterrupt:
            connection.shutdown(socket.SHUT_WR)  # interrupts the fork
            status = answer.read()
    if not status:
        print("the job was killed", file=sys.stderr)
        return 128 + signal.SIGKILL
    return status[0]


class _Job(socketserver.BaseRequestHandler):
    """One job, in the fork that the server made for it."""

    ended = False

    def handle(self) -> None:
        os.setsid()
        self.server.socket.close()
        length, streams, _, _ = socket.recv_fds(self.request, _LENGTH.size, len(_STREAMS))
        if not streams:
            return  # its client is gone already
        for stream, number in zip(streams, _STREAMS, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        with self.request.makefile("rb") as file:
            job = json.loads(file.read(*_LENGTH.unpack(length)))
        threading.Thread(target=self._end_with_client, daemon=True).start()
        status = _run(**job)
        self.ended = True
        with suppress(OSError):  # nobody may be left to be told
            self.request.sendall(bytes([status]))
        os._exit(0)  # what the client waits for: memory is given back before its connection closes

    def _end_with_client(self) -> None:
        """Interrupt this job and what it has started, as Ctrl-C would, when its client says or is gone; kill what does not end by that."""
        if not self.request.recv(1) and not self.ended:
            os.killpg(0, signal.SIGINT)
            time.sleep(PATIENCE)
            os.killpg(0, signal.SIGKILL)


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """Exit status of the script ``argv`` run in this process, as Python would run it."""
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
    """Give every BLAS that is loaded the threads that it would have read from ``environment``, where Snakemake says them."""
    from threadpoolctl import threadpool_limits

    if THREADS[0] in environment:
        threadpool_limits(int(environment[THREADS[0]]))


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """A fork for every connection of this user, until the driver is gone."""

    max_children = 1 << 16  # Snakemake says how many jobs run side by side
    block_on_close = False

    def __init__(self, listener: socket.socket, driver: int) -> None:
        super().__init__(listener.getsockname(), _Job, bind_and_activate=False)
        self.socket.close()
        self.socket, self.driver = listener, driver

    def verify_request(self, request: socket.socket, client_address: object) -> bool:
        return _user(request) == os.getuid()

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.driver:
            raise SystemExit


def serve(descriptor: int, driver: int) -> None:
    """Import what jobs need, then run those that come in at the listening socket ``descriptor`` until ``driver``, the parent process, is gone."""
    for name in PRELOADED:
        if os.getppid() != driver:
            return
        import_module(name)
    with _Server(socket.socket(fileno=descriptor), driver) as server:
        server.serve_forever(poll_interval=0.2)
