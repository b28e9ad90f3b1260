"""Selection of tests: what a target of the Makefile leaves out, the next one runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import selection


class Case(SimpleNamespace):
    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.add(mark.name)


def cases(name: str, count: int, *marks: str) -> list[Case]:
    return [Case(nodeid=f"tests/test_a.py::{name}[{number}]", marks={*marks}) for number in range(count)]


def test_a_third_of_a_large_product_is_not_nightly_and_the_same_third_each_time():
    made, again = cases("product", 300, "slow"), cases("product", 300, "slow")
    small = cases("few", selection.LARGE, "slow")
    others = cases("quick", 100) + cases("faults", 100, "slow", "damage") + small
    selection.thin([*made, *others])
    selection.thin(again)
    kept = [case.nodeid for case in made if "nightly" not in case.marks]
    assert 75 < len(kept) < 125 and kept == [case.nodeid for case in again if "nightly" not in case.marks]
    assert not any("nightly" in case.marks for case in others)


def test_a_sample_follows_no_axis_of_a_product():
    """Every value of two axes of 12 is met, with no value of one bound to a value of the other."""
    met = [(a, b) for a in range(12) for b in range(12) if selection.sampled(f"tests/test_a.py::product[{a}-{b}]")]
    assert all(len({pair[axis] for pair in met}) == 12 for axis in (0, 1))
    assert all(2 <= sum(pair[0] == value for pair in met) <= 8 for value in range(12))
