"""Fixtures of the tests of transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from reference_decoder import logits, site_inputs
from reference_statistics import write_statistics
from tiny_decoders import Case, random_tokens, save
from transform_cases import Given


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Callable[[Case], Given]:
    """Case -> :class:`Given`, made once."""

    @cache
    def make(case: Case) -> Given:
        config, state = case.build()
        folder = save(tmp_path_factory.mktemp("case"), config, state, torch.float64)
        tokens = random_tokens(config, 16, 24)
        inputs = site_inputs(state, config, tokens)
        return Given(
            case,
            folder,
            config,
            state,
            tokens,
            logits(state, config, tokens[:2]),
            inputs,
            write_statistics(folder / "statistics", inputs),
        )

    return make
