"""Cells of the configs in config/, counted per study."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml

from quantgrid.config import check
from quantgrid.config.cells import baseline
from quantgrid.config.grid import expand_studies, study_cells
from quantgrid.ground.places import ROOT

COUNTS = {
    "allocations": (44, {"budgets": 22, "choices": 28}, (2, 2, 12)),
    # config: (distinct cells, cells per study, distinct transforms, mitigations and formats among
    # the quantized cells)
    "config": (
        84,
        {
            "transforms-mitigations": 34,
            "weights": 20,
            "formats": 21,
            "transforms-formats": 10,
            "group-size": 18,
            "symmetry": 8,
        },
        (3, 4, 6),
    ),
    "formats": (
        57,
        {"granularity": 19, "symmetry": 9, "formats": 17, "scale-formats": 14, "activation-options": 9},
        (2, 3, 21),
    ),
    "first": (9, {"weights": 5, "both": 5}, (2, 2, 2)),
    "smoke": (50, {"methods": 8, "pairs": 26, "formats": 14, "granularity": 3, "bits": 4}, (22, 22, 16)),
    "oddities": (
        101,
        {
            "gptq-statistics": 27,
            "gptq-residual-error": 12,
            "gptq-linears": 12,
            "gptq-both-sides": 22,
            "rotation-parts": 30,
            "rotation-groups": 14,
            "four-bit-origin": 6,
            "first-token-activations": 5,
            "first-token-ranges": 6,
        },
        (5, 9, 10),
    ),
    "transforms": (
        111,
        {
            "transforms": 105,
            "scaling": 23,
            "rotation": 43,
            "principal-axes": 17,
            "blocks": 19,
            "learned": 27,
            "rotation-sites": 11,
            "groups": 7,
            "costs": 8,
        },
        (52, 2, 1),
    ),
    "mitigations": (
        164,
        {"mitigations": 151, "low-rank-on-gptq": 61, "options": 10, "propagation": 13, "trained-mitigations": 5},
        (3, 21, 3),
    ),
    "paper": (
        229,
        {
            "decomposition": 16,
            "transforms-mitigations": 31,
            "models": 18,
            "symmetry": 5,
            "group-size": 17,
            "formats": 33,
            "transforms-formats": 25,
            "two-level-scales": 11,
            "scale-formats": 21,
            "block-rotations": 31,
            "propagation": 17,
            "calibration": 5,
            "low-rank": 8,
            "bit-width": 15,
            "sides": 7,
            "components": 16,
            "seeds": 17,
            "overhead": 9,
            "residual-error-by-layer": 11,
        },
        (25, 17, 36),
    ),
    "best": (517, {"w4a16": 301, "w4a4": 217}, (8, 5, 19)),
    "methods-2026": (
        347,
        {
            "smollm2-mxfp4": 22,
            "smollm2-nvfp4": 22,
            "smollm2-int4": 22,
            "smollm2-autoround": 11,
            "smollm2-corrections": 28,
            "reference-corrections": 73,
            "reference-mxfp4": 42,
            "reference-nvfp4": 36,
            "reference-int4": 36,
            "planted-mxfp4": 19,
            "equal-bytes": 42,
            "equal-bytes-gptq": 42,
            "other-text": 12,
            "smallest": 16,
        },
        (11, 23, 3),
    ),
    "contradictions": (
        109,
        {"learning-objective": 21, "draws": 34, "rotation-parts": 33, "weight-symmetry": 18, "scale-scopes": 21},
        (14, 3, 9),
    ),
    "shifts": (27, {"shifts": 27}, (14, 1, 1)),
    "studies": (
        514,
        {
            "decomposition": 43,
            "transforms-mitigations": 92,
            "exactness": 12,
            "models": 19,
            "symmetry": 20,
            "group-size": 32,
            "formats": 58,
            "transforms-formats": 54,
            "two-level-scales": 23,
            "scale-formats": 32,
            "block-rotations": 27,
            "propagation": 14,
            "calibration": 12,
            "low-rank": 16,
            "bit-width": 24,
            "sides": 28,
            "components": 32,
            "seeds": 36,
            "overhead": 18,
            "residual-error-by-layer": 24,
            "weights": 68,
            "architectures": 43,
            "wikitext": 4,
        },
        (21, 21, 37),
    ),
}


@pytest.fixture(params=COUNTS)
def shipped(request, monkeypatch) -> tuple[str, dict[str, Any]]:
    """(name, content) of a config that the repository brings."""
    monkeypatch.chdir(ROOT)  # local paths are relative to it
    return request.param, yaml.safe_load((ROOT / "config" / f"{request.param}.yaml").read_text())


def test_shipped_configs_have_as_many_cells_as_stated(shipped):
    name, content = shipped
    expected, per_study, distinct = COUNTS[name]
    checked = check(content)
    found = expand_studies(checked)
    assert {study: len(study_cells(checked, study)) for study in checked["studies"]} == per_study
    assert len(found) == len(set(found)) == expected
    quantized = [cell for cell in found if cell.quantized]
    assert (
        tuple(len({getattr(cell, axis) for cell in quantized}) for axis in ("transform", "mitigation", "format"))
        == distinct
    )
    assert Counter(cell.model for cell in found if not cell.quantized).keys() == set(checked["models"])
    assert all(baseline(model) in found for model in checked["models"])


def test_unchecked_and_checked_configs_expand_to_the_same_cells(shipped):
    content = shipped[1]
    assert expand_studies(content) == expand_studies(check(content))


@pytest.mark.parametrize("name", ["config", "paper"])
def test_the_default_and_the_paper_config_are_wide_enough(name):
    quantized = [
        cell
        for cell in expand_studies(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()))
        if cell.quantized
    ]
    assert len(quantized) >= 20
    for axis, least in {"transform": 3, "mitigation": 4, "format": 4}.items():
        assert len({getattr(cell, axis) for cell in quantized}) >= least
