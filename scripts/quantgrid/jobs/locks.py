"""Exclusive lock of a results folder: one run at a time, from any checkout, config or machine.

The driver holds an operating-system lock (``flock``, by the library filelock) on a file of the
folder, and a note names the driver. The lock ends with the process. The note decides if the lock is
not effective: while a driver execs Snakemake, on file systems without locks, and on file systems
with locks local to one machine (NFS mounted with ``nolock``, Lustre without ``flock``).
"""

from __future__ import annotations

import atexit
import errno
import getpass
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ..ground.errors import ConfigError, shortened
from ..ground.storage import read_json, write_json

LOCK, NOTE = ".quantgrid.lock", ".quantgrid-run.json"
FIELDS = {
    "machine": str,
    "process": int,
    "started": (int, float),
    "since": str,
    "command": str,
    "user": str,
    "folder": str,
}
# File systems local to one machine. Machines that share a file system may not see each other's
# locks; all types not listed count as shared.
LOCAL = {
    "apfs",
    "bcachefs",
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hfs",
    "overlay",
    "ramfs",
    "reiserfs",
    "tmpfs",
    "xfs",
    "zfs",
}
# seconds for another run that inspects the folder to read the note and release the lock
PASSING = 2.0
_held: dict[Path, FileLock] = {}


def hold(results: str | Path) -> None:
    """Lock a results folder, created if missing, until this process ends; :class:`ConfigError`
    names another holder."""
    folder = Path(results).resolve()
    if folder in _held:
        return
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PASSING if _names_this_process(_note(folder)) else 0)
    except Timeout:
        note = _note(folder)
        holder = _described(None if _names_this_process(note) else note)
        raise ConfigError(
            f"{results} is in use by {holder}; wait for that run, or end it with Ctrl-C or kill -INT"
        ) from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            raise ConfigError(f"{folder / LOCK}: cannot be locked ({error.strerror})") from None
        print(
            f"quantgrid: {results} is on a file system without locks ({error.strerror}): only {NOTE} keeps runs apart",
            file=sys.stderr,
        )
    try:
        _check_note(folder, results)
    except ConfigError:
        lock.release()
        raise
    _held[folder] = lock
    write_json(folder / NOTE, _own())
    atexit.register(_let_go, folder, os.getpid())


def _let_go(folder: Path, process: int) -> None:
    """Delete the note and release the lock when the process that holds it ends, but not in a
    fork."""
    if os.getpid() == process and (lock := _held.pop(folder, None)):
        (folder / NOTE).unlink(missing_ok=True)
        lock.release()


def _check_note(folder: Path, results: str | Path) -> None:
    """Raise :class:`ConfigError` if the note of another run is valid although the lock is free."""
    note = _note(folder)
    if note is None:
        return
    if not note:
        print(
            f"quantgrid: {results}/{NOTE} is corrupt and was replaced; no process holds the lock",
            file=sys.stderr,
        )
    elif note["machine"] == socket.gethostname():
        if _lives(note) and not _names_this_process(note):
            raise ConfigError(
                f"{results} is in use by {_described(note)}; wait for that run, or end it with Ctrl-C or kill -INT"
            )
    elif file_system(folder) not in LOCAL:
        raise ConfigError(
            f"{results} is in use by {_described(note)}; continue there, or, if that machine or run is gone, "
            f"delete {folder / NOTE}"
        )


def _own() -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {
        "machine": socket.gethostname(),
        "process": os.getpid(),
        "started": started,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shortened(shlex.join(sys.argv)),
        "user": _user(),
        "folder": os.getcwd(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # user of a container without an entry in passwd
        return str(os.getuid())


def _note(folder: Path) -> dict[str, Any] | None:
    """Read the note of a results folder; None if there is none, empty if it is corrupt."""
    if not os.path.lexists(folder / NOTE):
        return None
    try:
        note = read_json(folder / NOTE)
    except (ConfigError, OSError):
        return {}
    return note if all(isinstance(note.get(name), kind) for name, kind in FIELDS.items()) else {}


def _described(note: dict[str, Any] | None) -> str:
    if not note:
        return f"a run that {NOTE} does not name"
    return (
        f"process {note['process']} on {shortened(note['machine'])} "
        f"({shortened(note['command'])}, by {shortened(note['user'])} in "
        f"{shortened(note['folder'])}, since {shortened(note['since'])})"
    )


def _lives(note: dict[str, Any]) -> bool:
    """Check whether the process in a note of this machine is alive, and not a later process with
    the same id."""
    try:
        return abs(psutil.Process(note["process"]).create_time() - note["started"]) < 5
    except (psutil.Error, ValueError, OverflowError):
        return False


def _names_this_process(note: dict[str, Any] | None) -> bool:
    """Check whether this process wrote the note, possibly before an exec."""
    return bool(note) and (note["machine"], note["process"]) == (socket.gethostname(), os.getpid()) and _lives(note)


def file_system(folder: Path) -> str:
    """Return the type of the file system of ``folder``, such as ``ext4`` or ``nfs4``; empty if
    unknown."""
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounted[parent] for parent in (folder, *folder.parents) if parent in mounted), "")
