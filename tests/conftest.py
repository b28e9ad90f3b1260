"""Fixtures shared by the tests of the workflow."""

from __future__ import annotations

import pytest

from workflow import Checkout


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the smoke config ran from nothing to its report."""
    checkout = Checkout.make(tmp_path_factory.mktemp("smoke") / "quantgrid")
    checkout.run("smoke")
    return checkout
