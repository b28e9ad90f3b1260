"""Fixtures shared by the tests of the workflow."""

from __future__ import annotations

import pytest

from workflow import RESULT_FILES, Checkout, one_cell


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the smoke config ran from nothing to its report."""
    checkout = Checkout.make(tmp_path_factory.mktemp("smoke") / "quantgrid")
    checkout.run("smoke")
    return checkout


@pytest.fixture(scope="session")
def one_cell_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run on this machine leaves of the smoke config made one cell."""
    checkout = one_cell(Checkout.make(tmp_path_factory.mktemp("one-cell") / "quantgrid"))
    checkout.run("smoke")
    return checkout.contents("results-smoke", *RESULT_FILES)
