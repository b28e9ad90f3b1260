"""Choice of the parameters that `make test` runs; `make test-all` runs the others too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def others_slow(values: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """``values`` (tuples for several arguments) for ``parametrize``; those that ``quick`` is false
    for are marked slow."""
    found = []
    for value in values:
        arguments = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*arguments, marks=[] if quick(*arguments) else [pytest.mark.slow]))
    return found
