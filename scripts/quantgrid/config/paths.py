"""Paths in a config: ``~`` expanded, impossible names rejected. Standard library only."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError, shown
from ..ground.places import ROOT

RESULTS, LONGEST = (
    "results",
    255,
)  # default results folder; limits of a path in characters, and of each part in bytes
_STORED = "run with a profile that has its address (docs/how-to/cluster.md)"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def expanded(given: Any, where: str) -> Path:
    """Expand the path ``given`` at the config key ``where``."""
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"{where}: {shown(given)} is not accepted; expected the path of a file or a folder")
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in given):
        raise ConfigError(f"{where}: {shown(given)} holds control characters")
    if any(len(os.fsencode(part)) > LONGEST for part in given.split("/")) or len(given) > 16 * LONGEST:
        raise ConfigError(
            f"{where}: a name of {max(map(len, given.split('/')))} characters; file systems take at most {LONGEST}"
        )
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ConfigError(
            f"{where}: {shown(given)}: no such user; write ./{given.split('/')[0]} for a folder of that name"
        )
    return Path(path)


def results_folder(config: Mapping[str, Any]) -> str:
    """Return the normalized results folder of ``config``; :class:`ConfigError` for a path that
    rules or commands would misread."""
    given = config.get("results_dir", RESULTS)
    path = os.path.normpath(expanded(given, "results_dir"))
    own = os.path.realpath(path) == str(ROOT)
    reasons = {
        f"is a URL; name a folder, and for object storage {_STORED}": _URL.match(given),
        "begins with '-', which command-line tools read as an option; write ./ before it": given.startswith("-"),
        "holds braces, which Snakemake reads as wildcards": re.search(r"[{}]", path),
        f"has {len(path)} characters; at most {LONGEST} leave room for the names of results": len(path) > LONGEST,
        "is the folder of quantgrid, whose files results would mix with; name a folder in it, such as 'results'": own,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigError(f"results_dir: {shown(given)} {found[0]}")
    return path


def check_writable(folder: str) -> None:
    """Raise :class:`ConfigError` if the results folder, or its nearest existing parent, is not
    writable."""
    path = Path(folder)
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
    except OSError as error:
        raise ConfigError(f"results_dir: '{folder}' cannot be looked at ({error.strerror})") from None
    if not writable:
        raise ConfigError(f"results_dir: '{folder}' cannot be written ({existing} is not a writable folder)")
