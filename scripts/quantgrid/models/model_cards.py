"""Licences of a model folder, and the metadata at the head of its README.md, a card of the hub:
https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from ..ground.documents import parse_yaml
from ..ground.errors import ConfigError

README = "README.md"
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
KEYS = ("license", "license_name", "license_link", "language")
_HEAD = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_CHARACTERS = 1 << 20  # of a card that are read


def license_files(folder: str | Path) -> list[Path]:
    """Files with licences and notices of a model folder, in the order of :data:`LICENSES`."""
    return [path for pattern in LICENSES for path in sorted(Path(folder).glob(pattern)) if path.is_file()]


def card_metadata(folder: str | Path) -> dict[str, Any]:
    """Read ``license``, ``license_name``, ``license_link`` (texts) and ``language`` (a list of codes) from
    the head of README.md; absent keys are left out.

    A head or a value that cannot be read is left out with a line on standard error: the card of another
    author does not stop an export.
    """
    path = Path(folder) / README
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = _HEAD.match(file.read(_CHARACTERS))
    try:
        found = parse_yaml(head[1], path) if head else None
    except ConfigError as error:
        print(f"{error}; license and language of the model are not on the card", file=sys.stderr)
        return {}
    stated = found if isinstance(found, dict) else {}
    kept = {key: _value(key, stated[key]) for key in KEYS if stated.get(key) not in (None, "", [])}
    for key in (key for key, value in kept.items() if value is None):
        print(f"{path}: {key}: {stated[key]!r:.60} is not a text; it is not on the card", file=sys.stderr)
    return {key: value for key, value in kept.items() if value is not None}


def _value(key: str, value: Any) -> Any:
    """Value of a key as the hub reads it; None for one of another type."""
    if key != "language":
        return value if isinstance(value, str) else None
    codes = ["no" if code is False else code for code in (value if isinstance(value, list) else [value])]
    return codes if all(isinstance(code, str) for code in codes) else None  # YAML reads Norwegian as false
