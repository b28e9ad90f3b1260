"""Mistakes of a config: messages of failing checks, and the one message that lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..ground.errors import ConfigError

MOST_MISTAKES = 20  # mistakes listed in one message


def collected(check: Callable[..., Any]) -> Iterator[str]:
    """Yield the message of a failing check; nothing if it passes."""
    try:
        check()
    except ConfigError as error:
        yield str(error)


def refuse(found: Iterable[str]) -> None:
    """Raise one :class:`ConfigError` that lists all distinct mistakes, a line each; pass if there
    is none."""
    mistakes = list(dict.fromkeys(found))
    if len(mistakes) == 1:
        raise ConfigError(mistakes[0])
    if mistakes:
        more = [f"... and {len(mistakes) - MOST_MISTAKES} more"] * (len(mistakes) > MOST_MISTAKES)
        listed = "\n  ".join([*mistakes[:MOST_MISTAKES], *more])
        raise ConfigError(f"{len(mistakes)} mistakes in the config:\n  {listed}")
