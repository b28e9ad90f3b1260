"""Choice of the parameters that `make test` runs, and of those of the others that `make test-all`
runs; `make test-nightly` runs the rest."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest

LARGE = 24  # slow cases of one test: a product, of which one case in SHARE stays in `make test-all`
SHARE = 3


def sampled(name: str) -> bool:
    """Whether a case of a large product, by its name, stays in `make test-all`: a fixed sample that
    follows no axis of the product."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % SHARE == 0


def thin(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of large products that the sample leaves out as nightly. Fault campaigns stay
    whole."""
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("damage"):
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        for item in cases if len(cases) > LARGE else ():
            if not sampled(item.nodeid):
                item.add_marker(pytest.mark.nightly)


def others_slow(values: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """``values`` (tuples for several arguments) for ``parametrize``; those that ``quick`` is false
    for are marked slow."""
    found = []
    for value in values:
        arguments = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*arguments, marks=[] if quick(*arguments) else [pytest.mark.slow]))
    return found
