"""Fixtures of the tests of plans."""

from __future__ import annotations

import pytest

from quantgrid.ground.places import ROOT


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the path of the tiny model is relative
