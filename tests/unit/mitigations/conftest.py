"""Decoders of the tests of trained mitigations, each made once per file."""

from __future__ import annotations

from functools import cache

import pytest

from learned_cases import Given


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return cache(lambda case: Given.make(tmp_path_factory.mktemp("case"), case))
