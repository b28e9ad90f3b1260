"""One run at a time in a results folder, whichever checkout, config or machine it is started from.

The driver holds a lock of the operating system (``flock``, by the library filelock) on a file of the folder, and a note
names the driver. The lock ends with its process, however that ends. The note counts where the lock does not reach:
while a driver becomes Snakemake, on file systems without locks, and on those whose locks may be known to one machine
alone (NFS mounted with ``nolock``, Lustre without ``flock``).
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

from .errors import ConfigError, shortened
from .storage import read_json, write_json

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
# Machines that share a file system may each see their own locks alone; anything that is not listed counts as shared.
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
_held: dict[Path, FileLock] = {}


def hold(results: str | Path) -> None:
    """Lock a results folder, made where missing, until this process ends; :class:`ConfigError` names another holder."""
    folder = Path(results).resolve()
    if folder in _held:
        return
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{results} is in use by {_described(_note(folder))}; wait for that run, or end it with Ctrl-C or kill -INT"
        ) from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            raise ConfigError(f"{folder / LOCK}: cannot be locked ({error.strerror})") from None
        print(
            f"quantgrid: {results} lies on a file system without locks ({error.strerror}): only {NOTE} parts runs",
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
    """Delete the note and release the lock at the end of the process that held it, not of a fork."""
    if os.getpid() == process and (lock := _held.pop(folder, None)):
        (folder / NOTE).unlink(missing_ok=True)
        lock.release()


def _check_note(folder: Path, results: str | Path) -> None:
    """Refuse where the note of another run counts though nobody holds the lock."""
    note = _note(folder)
    if note is None:
        return
    if not note:
        print(
            f"quantgrid: {results}/{NOTE} names nobody: garbled, and replaced, since nobody holds the lock",
            file=sys.stderr,
        )
    elif note["machine"] == socket.gethostname():
        if note["process"] != os.getpid() and _lives(note):
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
    except (KeyError, OSError):  # a container's user that no file names
        return str(os.getuid())


def _note(folder: Path) -> dict[str, Any] | None:
    """The note of a results folder; None where there is none, empty where it is garbled."""
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
    """Whether the process of a note of this machine runs: the same one, not a later one with its number."""
    try:
        return abs(psutil.Process(note["process"]).create_time() - note["started"]) < 5
    except (psutil.Error, ValueError, OverflowError):
        return False


def file_system(folder: Path) -> str:
    """Type of the file system that ``folder`` lies on, such as ``ext4`` or ``nfs4``; empty where it cannot be told."""
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounted[parent] for parent in (folder, *folder.parents) if parent in mounted), "")
