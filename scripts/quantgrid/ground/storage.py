"""Atomic files: JSON and safetensors, written to a temporary file and renamed.

JSON has sorted keys and no dates, so that equal content gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .documents import parse_json
from .errors import ConfigError, NumericalFailure

_CHUNK = 1 << 20  # bytes: fits the cache of a core
verified: dict[str, str] = {}  # path -> digest of inputs of this job that were already verified
# absolute path -> deferred verification of a file that may never be read
put_off: dict[str, Callable[[], None]] = {}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it on success, delete it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """Umask of the process (reading it requires setting it).

    Without it safetensors writes files that other users of a cluster cannot read.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON; NaN or infinity raises :class:`NumericalFailure`."""
    try:
        write_text(path, json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    except ValueError as error:
        raise NumericalFailure(f"{path}: a value is not finite ({first_not_finite(content)})") from error


def read_json(path: str | Path, advice: str = "delete it and run again", largest: int = 1 << 30) -> dict[str, Any]:
    """JSON object in a file of at most ``largest`` bytes; else :class:`ConfigError` with
    ``advice``."""
    if (size := os.stat(path).st_size) > largest:
        raise ConfigError(f"{path}: {size} bytes; at most {largest} are accepted; {advice}")
    try:
        content = parse_json(Path(path).read_bytes(), str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; {advice}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a JSON object; {advice}")
    return content


def first_not_finite(content: Any, at: str = "") -> str:
    """Path of the first NaN or infinity inside nested ``content``, empty if there is none."""
    items = (
        content.items()
        if isinstance(content, Mapping)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else ()
    )
    for key, value in items:
        if found := first_not_finite(value, f"{at}.{key}".lstrip(".")):
            return found
    return at if isinstance(content, float) and not math.isfinite(content) else ""


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_of(source: str | Path | bytes, threads: int = 1) -> str:
    """Hexadecimal BLAKE3 digest of a file, or of bytes.

    A file is read, not mapped: mapped pages would count as memory of the process.
    """
    from blake3 import blake3

    digest = blake3(max_threads=threads)
    if isinstance(source, bytes):
        return digest.update(source).hexdigest()
    buffer = memoryview(bytearray(_CHUNK))
    with open(source, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a dict of torch tensors; ``metadata`` becomes one JSON string in the file header."""
    from safetensors.torch import save_file

    header = {"quantgrid": json.dumps(metadata or {}, sort_keys=True)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)


def settle(path: str | Path) -> None:
    """Run a verification deferred in ``put_off``, of a file or of all files in a folder.

    Call it before files are read by other means than :func:`open_tensors`.
    """
    place = os.path.abspath(path)
    for name in [name for name in put_off if name == place or name.startswith(place + os.sep)]:
        put_off.pop(name)()


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file to read single tensors; run its deferred verification first.

    Raises :class:`ConfigError` for a truncated or altered header.
    """
    settle(path)
    with _opened(path) as file:
        yield file


def tensor_names(path: str | Path) -> list[str]:
    """Names of the tensors of a file, without verifying it."""
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ConfigError(f"{path}: not a complete safetensors file ({error}); delete it and run again") from None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the ``metadata`` given to :func:`write_tensors`."""
    with open_tensors(path) as file:
        return json.loads((file.metadata() or {}).get("quantgrid", "{}"))


def read_tensors(path: str | Path) -> dict[str, Any]:
    """All tensors of a safetensors file."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
