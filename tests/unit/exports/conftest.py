"""Fixtures of the tests of exports."""

from __future__ import annotations

import pytest

from export_cases import Source


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Tiny models by family, each made once: ``sources(architecture, **settings)``."""
    made: dict[tuple, Source] = {}

    def make(architecture: str = "LlamaForCausalLM", **settings) -> Source:
        key = (architecture, *sorted(settings.items()))
        if key not in made:
            made[key] = Source.tiny(architecture, tmp_path_factory.mktemp(architecture), **settings)
        return made[key]

    return make
