"""Jobs without start-up: a server that has imported torch and transformers forks a process for every job of a run on this machine.

``run_workflow.py --warm`` starts it. `run_job.py` hands its words, folder, environment and standard streams to it and ends as the fork ends; a fork
whose `run_job.py` is gone ends as well. Imports are all that forks share: each computes what a fresh process would, to the same bytes.

Snakemake's benchmark files measure the process that it starts, so they hold no processor time and memory of a fork; its log does.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from pathlib import Path

from .errors import ConfigError

SOCKET = "QUANTGRID_WARM"  # the variable that tells a run's jobs where the server listens
PRELOADED = ("numpy", "scipy.linalg", "safetensors.torch", "threadpoolctl", "torch", "tqdm", "transformers",
             "transformers.models.llama.modeling_llama")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # what a BLAS reads once, when it is loaded
_STREAMS = (0, 1, 2)
_LENGTH = struct.Struct("<Q")


def start(environment: dict[str, str]) -> None:
    """Start the server, with ``environment`` added to its own, as a child of this process, which is about to become the driver; jobs find it by
    their environment."""
    if sys.platform != "linux":
        raise ConfigError("--warm needs Linux: elsewhere a process with torch loaded cannot safely be forked")
    address = os.path.join(tempfile.mkdtemp(prefix="quantgrid-"), "jobs")
    # CUDA is asked through its library of facts: the runtime, once asked, does not survive a fork.
    settings = {**os.environ, **environment, **dict.fromkeys(THREADS, "1"), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(128)  # jobs may come before the imports are done
        command = [sys.executable, str(Path(__file__).parents[1] / "serve_jobs.py"), str(listener.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C is for the driver.
        subprocess.Popen(command, pass_fds=[listener.fileno()], env=settings, stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[SOCKET] = address


def hand_over(address: str) -> int:
    """Let the server at ``address`` run this process's job; its exit status."""
    words = json.dumps({"argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [_LENGTH.pack(len(words))], _STREAMS)
            connection.sendall(words)
            status = connection.recv(1)
        except OSError as error:
            raise SystemExit(f"the process that runs jobs has ended ({error}); start the run again") from None
    if not status:
        raise SystemExit("the job was killed")
    return status[0]


class _Job(socketserver.BaseRequestHandler):
    """One job, in the fork that the server made for it."""

    def handle(self) -> None:
        self.server.socket.close()
        length, streams, _, _ = socket.recv_fds(self.request, _LENGTH.size, len(_STREAMS))
        for stream, number in zip(streams, _STREAMS, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        with self.request.makefile("rb") as file:
            job = json.loads(file.read(*_LENGTH.unpack(length)))
        threading.Thread(target=self._end_with_client, daemon=True).start()
        self.request.sendall(bytes([_run(**job)]))

    def _end_with_client(self) -> None:
        if not self.request.recv(1):  # says nothing more while it lives
            os.kill(os.getpid(), signal.SIGKILL)


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """Exit status of the script ``argv`` run in this process, as Python would run it."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if name != SOCKET})
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
    """A fork for every connection, until the driver is gone and the last fork has ended."""

    max_children = 1 << 16  # Snakemake says how many jobs run side by side
    block_on_close = False

    def __init__(self, listener: socket.socket, driver: int) -> None:
        super().__init__(listener.getsockname(), _Job, bind_and_activate=False)
        self.socket.close()
        self.socket, self.driver = listener, driver

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.driver and not self.active_children:
            address = Path(self.server_address)
            address.unlink(missing_ok=True)
            address.parent.rmdir()
            raise SystemExit


def serve(descriptor: int, driver: int) -> None:
    """Import what jobs need, then run those that come in at the listening socket ``descriptor`` until ``driver``, the parent process, is gone."""
    for name in PRELOADED:
        import_module(name)
    with _Server(socket.socket(fileno=descriptor), driver) as server:
        server.serve_forever(poll_interval=0.2)
