"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

import pytest
import torch

from checkpoint_cases import CASE_OF, WIDE, Given
from reference_decoder import site_inputs
from reference_statistics import write_statistics
from tiny_decoders import random_tokens, save


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Given]:
    made = {}
    for name, case in {**CASE_OF, "wide": WIDE}.items():
        config, state = case.build(torch.float32)
        folder, tokens = save(tmp_path_factory.mktemp(name), config, state), random_tokens(config, 8, 24)
        made[name] = Given(
            folder, config, tokens, write_statistics(folder / "statistics", site_inputs(state, config, tokens))
        )
    return made
