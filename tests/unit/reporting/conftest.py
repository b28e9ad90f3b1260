"""Fixtures of the tests of records."""

from __future__ import annotations

import pandas as pd
import pytest

from quantgrid.reporting.data import collection
from record_cases import FULL, GPTQ, RTN, evaluations


@pytest.fixture
def frame() -> pd.DataFrame:
    return collection.records(evaluations(FULL, RTN, GPTQ))
