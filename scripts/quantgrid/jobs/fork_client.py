"""Client of the fork server: hands a job over. Every job of a run with a warm start imports this
module before anything else, so it imports little."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress

from ..ground.places import SCRIPTS

SOCKET, SERVED = (
    "QUANTGRID_WARM",
    "QUANTGRID_WARM_FOR",
)  # environment variables: address of the server, and identity of its clients
STREAMS = (0, 1, 2)
DECLINED = b"declined"  # answer instead of a status, which is one byte
LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")


def address(name: str) -> str:
    """Return the address of a server in Linux's abstract namespace, which leaves no file behind."""
    return f"\0{name}"


def identity() -> str:
    """Return machine, Python environment and scripts of this process; the server runs only jobs
    with the same identity."""
    return f"{os.uname().nodename} {sys.prefix} {SCRIPTS}"


def user(connection: socket.socket) -> int:
    """Return the user id of the peer process."""
    return _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]


def connect() -> socket.socket | None:
    """Connect to the fork server of this job; None if there is none for it."""
    if os.environ.get(SERVED) != identity():
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address(os.environ[SOCKET]))
        if user(connection) == os.getuid():
            return connection
    except OSError:
        pass
    print("the fork server is gone; running this job in a fresh interpreter", file=sys.stderr)
    return None


def hand_over(connection: socket.socket) -> int | None:
    """Run this process's job on the server; returns its exit status when it has ended, None if the
    server runs no jobs."""
    words = json.dumps({"argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    status = b""
    with connection, connection.makefile("rb") as answer, suppress(OSError):
        try:
            socket.send_fds(connection, [LENGTH.pack(len(words))], STREAMS)
            connection.sendall(words)
            status = answer.read()
        except KeyboardInterrupt:
            connection.shutdown(socket.SHUT_WR)  # interrupts the fork
            status = answer.read()
    if status == DECLINED:
        print("an import initialized CUDA in the fork server; running this job in a fresh interpreter", file=sys.stderr)
        return None
    if not status:
        print("the job was killed", file=sys.stderr)
        return 128 + signal.SIGKILL
    return status[0]
