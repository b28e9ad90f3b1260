"""Strict YAML and JSON readers: bounded size, depth and number of values; no duplicate keys.

YAML is checked event by event before anything is constructed, so that neither nested aliases
("billion laughs") nor deep nesting cost more than their text. Every error is one line with the file
and, for YAML, the line.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError, shortened, shown

YAML_BYTES, JSON_BYTES = 4 << 20, 64 << 20
DEPTH = 40
VALUES = 50_000  # of a YAML file; aliases count at each use
DIGITS = 100  # digits of a number
# Numbers that YAML 1.1 reads as octal or to the base 60.
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*")


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file of one document, or of a .json file.

    Raises :class:`ConfigError` for an unreadable file or one beyond the bounds.
    """
    if Path(path).suffix == ".json":
        return read_json(path)
    return parse_yaml(_text(path, YAML_BYTES, "YAML"), path)


def parse_yaml(text: str, path: str | Path) -> Any:
    """Parse a YAML text of one document, which ``path`` names in messages; :class:`ConfigError` if
    unreadable or beyond the bounds."""
    import yaml

    try:
        _Events(path).check(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(
            f"{path}: not a readable YAML file ({line}{shortened(error.problem or str(error))})"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable YAML file ({shortened(str(error))})") from None


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; :class:`ConfigError` if unreadable or beyond the bounds."""
    return parse_json(_text(path, JSON_BYTES, "JSON"), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON text; refuse NaN, infinity, duplicate keys and nesting beyond :data:`DEPTH`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ConfigError(
                f"{where}: the key {shown(next(name for name in names if names.count(name) > 1))} is written twice"
            )
        return found

    def refuse(constant: str) -> None:
        raise ConfigError(f"{where}: {constant} is not valid JSON; a finite number is accepted")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ConfigError(f"{where}: JSON is nested more than {DEPTH} levels deep, the accepted maximum") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not a JSON file ({shortened(str(error))})") from None
    check_depth(content, where)
    return content


def check_depth(content: Any, where: str) -> None:
    """Raise :class:`ConfigError` for nesting beyond :data:`DEPTH`, or for cyclic references."""
    level = [content]
    for _ in range(DEPTH + 1):
        inner = (
            value
            for part in level
            for value in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        )
        level = list(
            {id(value): value for value in inner if isinstance(value, (dict, list))}.values()
        )  # visit shared objects once
        if not level:
            return
    raise ConfigError(f"{where}: JSON is nested more than {DEPTH} levels deep, the accepted maximum")


def _text(path: str | Path, limit: int, kind: str) -> str:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise ConfigError(f"{path}: {status.st_size} bytes; files of at most {limit} bytes are accepted")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a readable {kind} file (not UTF-8 from byte {error.start})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{shortened(str(path))}: not a readable {kind} file ({getattr(error, 'strerror', error)})"
        ) from None


@dataclass
class _Open:
    """Unfinished mapping or sequence: keys with lines, whether a key is next, nested values and
    levels."""

    mapping: bool
    anchor: str | None
    keys: dict[str, int] = field(default_factory=dict)
    at_key: bool = False
    values: int = 1
    levels: int = 1


class _Events:
    """Checks of bounds and keys on the event stream of a YAML file."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.open: list[_Open] = []
        # anchor -> number of values and levels of its node
        self.sizes: dict[str, tuple[int, int]] = {}

    def check(self, events: Iterable[Any]) -> None:
        import yaml

        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.CollectionStartEvent):
                mapping = isinstance(event, yaml.MappingStartEvent)
                self._key_or_value(None, line)
                self.open.append(_Open(mapping, event.anchor, at_key=mapping))
                self._bound(len(self.open), 0, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close(line)
            elif isinstance(event, yaml.ScalarEvent):
                plain = event.implicit[0] and not event.style
                if plain:
                    self._check_plain(event.value, line)
                self._key_or_value(event, line)
                self._add(event.anchor, 1, 0, line)
            elif isinstance(event, yaml.AliasEvent):
                self._key_or_value(None, line)
                self._alias(event.anchor, line)

    def _refuse(self, line: int, reason: str) -> None:
        raise ConfigError(f"{self.path}, line {line}: {reason}")

    def _key_or_value(self, event: Any, line: int) -> None:
        """Record a key of the innermost mapping, or its value.

        ``event`` is the scalar, None for anything else.
        """
        if not self.open or not self.open[-1].mapping:
            return
        inner = self.open[-1]
        if inner.at_key:
            if event is None:
                self._refuse(line, "a key is not text; expected 'key: value'")
            if event.value in inner.keys:
                self._refuse(
                    line,
                    f"the key {shown(event.value)} is written twice, first in line {inner.keys[event.value]}; "
                    "keep one of them",
                )
            inner.keys[event.value] = line
        inner.at_key = not inner.at_key

    def _alias(self, anchor: str, line: int) -> None:
        if any(part.anchor == anchor for part in self.open):
            self._refuse(line, f"'*{shortened(anchor)}' holds itself")
        values, levels = self.sizes.get(anchor, (1, 0))
        self._add(None, values, levels, line)

    def _close(self, line: int) -> None:
        done = self.open.pop()
        self._add(done.anchor, done.values, done.levels, line)

    def _add(self, anchor: str | None, values: int, levels: int, line: int) -> None:
        """Add a complete value with its contents to the enclosing collection."""
        if anchor is not None:
            self.sizes[anchor] = (values, levels)
        if self.open:
            around = self.open[-1]
            around.values, around.levels = around.values + values, max(around.levels, levels + 1)
            self._bound(len(self.open) + levels, around.values, line)

    def _bound(self, levels: int, values: int, line: int) -> None:
        if levels > DEPTH:
            self._refuse(line, f"nested more than {DEPTH} deep")
        if values > VALUES:
            self._refuse(line, f"more than {VALUES} values; aliases count at each use")

    def _check_plain(self, value: str, line: int) -> None:
        """Refuse numbers that YAML 1.1 reads in another base, and numbers too long for any use."""
        if len(value) > DIGITS and re.fullmatch(r"[-+]?[0-9][0-9A-Fa-fx_.]*([eE][-+]?[0-9]+)?", value):
            self._refuse(line, f"a number of {len(value)} characters; at most {DIGITS} are accepted")
        if _OTHER_BASE.fullmatch(value):
            base, reason = (60, "':'") if ":" in value else (8, "0 in front")
            self._refuse(
                line, f"YAML reads {value} as a number to the base {base}; write it without {reason}, or in quotes"
            )
