"""Formats that allocate bits: their cells, the uniform cells beside them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from grid_cases import cells, config, refusal, study
from quantgrid.config import allocations, deployments, entries, races
from quantgrid.config.cells import MIXED
from quantgrid.config.grid import expand_studies
from quantgrid.config.planned_features import planned_verdict
from quantgrid.ground.errors import ConfigError
from quantgrid.models.shapes import ModelShape
from quantgrid.schemes import scheme

INPUTS = {
    "corpora": {
        "text": {"source": "builtin", "part": "calibration", "windows": 8, "window": 64},
        "one": {"windows": 1},
    },
    "calibrations": {"default": {"corpus": "text"}, "short": {"corpus": "one"}},
    "mitigations": {
        "in-turn": {"method": "gptq", "propagation": "sequential"},
        "short": {"method": "gptq", "calibration": "short"},
    },
}
SCHEMES = ["w4a16 group-64", "w4a16 group-32", "w8a16 channel", "int3 group-64"]
INT3 = {"preset": "int3", "activation": None}


def formats(**changes: Any) -> dict[str, Any]:
    """Entries of the formats ``mixed``, with changes of its allocation, and ``int3``."""
    return {"mixed": {"allocate": {"budget": 5.0, "schemes": SCHEMES, **changes}}, "int3": INT3}


def grid(*studies: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config(*studies, **INPUTS, formats=formats(**changes))


def mixed(**changes: Any) -> dict[str, Any]:
    return study(formats=["mixed"], granularities=["native"], **changes)


def entry_refusal(**entry: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        given = config(**INPUTS, formats={"mixed": entry, "int3": INT3, "other": {"allocate": {"schemes": SCHEMES}}})
        allocations.check_entry(given, "mixed", entry)
    return str(caught.value)


def test_an_allocated_cell_brings_the_uniform_cells_within_its_budget():
    found = cells(mixed(), **INPUTS, formats=formats())
    assert [(cell.format, cell.granularity) for cell in found] == [
        ("bf16", "-"),
        ("mixed", MIXED),
        ("w4a16", "group-64"),
        ("w4a16", "group-32"),
        ("int3", "group-64"),
    ], "fp32 scales: 4.5, 5 and 3.5 bits; eight bits are beyond the budget of 5"
    assert len(cells(mixed(), **INPUTS, formats=formats(budget=4.6))) == 4


def test_the_schemes_of_a_cell_are_those_of_its_candidates():
    given = grid(mixed())
    cell = next(cell for cell in cells(mixed(), **INPUTS, formats=formats()) if cell.format == "mixed")
    found = entries.resolved_schemes(given, cell)
    assert found["weight"] is None and not found["activation"] and found["tied"]
    assert list(found["candidates"]) == SCHEMES
    assert found["candidates"]["w4a16 group-32"] == scheme("w4a16", granularity="group-32").to_dict()


def test_alternatives_are_formats_of_their_own():
    given = grid(mixed(), alternatives=3)
    assert entries.entry_names(given, "formats", "mixed", "studies.a.formats") == ["mixed-a1", "mixed-a2", "mixed-a3"]
    found = [cell for cell in cells(mixed(), **INPUTS, formats=formats(alternatives=3)) if cell.granularity == MIXED]
    assert [allocations.allocation_of(given, cell)["rank"] for cell in found] == [1, 2, 3]
    assert {allocations.base_name(given, cell.format) for cell in found} == {"mixed"}


def test_stored_bits_of_a_model_are_those_of_all_linears():
    shape = ModelShape("LlamaForCausalLM", 64, 96, 2, 4, 2, 16, 61)
    assert allocations.stored_bits(shape, scheme("w4a16", granularity="group-32", scale_format="fp16")) == 4.5


@pytest.mark.parametrize(
    ("allocate", "other", "message"),
    [
        ({}, {"preset": "int4"}, "formats.mixed.preset: the schemes of an allocation are those of its candidates"),
        ({}, {"activation": None}, "formats.mixed.activation: "),
        ({"budget": None}, {}, "formats.mixed.allocate.budget: objective 'divergence' takes a budget"),
        ({"objective": "bits"}, {}, "with 'bits' leave it out"),
        ({"divergence": 0.1}, {}, "formats.mixed.allocate.divergence: "),
        ({"schemes": ["w4a16", "nvpf4"]}, {}, "formats.mixed.allocate.schemes.1: unknown format 'nvpf4'"),
        ({"schemes": ["w4a16", "w8a16 row"]}, {}, "formats.mixed.allocate.schemes.1: unknown granularity 'row'"),
        ({"schemes": ["w4a16", "other"]}, {}, "format 'other' is itself an allocation"),
        ({"schemes": ["w4a16", "int4"]}, {}, "format 'int4' rounds more or less than the weights of all linears"),
        ({"schemes": ["w4a16", "bf16"]}, {}, "format 'bf16' rounds more or less"),
        ({"schemes": ["w4a16", "w4a16 channel"]}, {}, "'w4a16 channel' and 'w4a16' are the same scheme; keep one"),
        ({"target": "vllm"}, {}, "'int3 group-64' not among symmetric integers of 4 and 8 bits"),
        (
            {"target": "vllm", "groups": "linear", "schemes": SCHEMES[:2]},
            {},
            "formats.mixed.allocate.groups: vllm fuses",
        ),
    ],
)
def test_entries_that_no_cell_could_have_are_refused(allocate, other, message):
    assert message in entry_refusal(allocate={"budget": 5.0, "schemes": SCHEMES, **allocate}, **other)


def test_schemes_of_one_server_family_are_accepted():
    given = grid(mixed(), target="vllm", schemes=SCHEMES[:3])
    allocations.check_entry(given, "mixed", given["formats"]["mixed"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularities": ["group-64"]}, "the schemes of format 'mixed' state their granularity, so 'group-64'"),
        ({"transforms": ["awq"]}, "transform 'awq' is fitted to one scheme, format 'mixed' has several"),
        ({"mitigations": ["qat_finetune"]}, "mitigation 'qat_finetune' solves linears in view of each other"),
        ({"mitigations": ["in-turn"]}, "mitigation 'in-turn' solves linears in view of each other"),
        ({"mitigations": ["short"]}, "corpus 'one' has one window; set its 'windows' to at least 2"),
    ],
)
def test_cells_that_allow_no_allocation_are_refused(changes, message):
    assert message in refusal({**mixed(), **changes}, **INPUTS, formats=formats())


def test_a_budget_below_the_smallest_scheme_is_refused_with_that_scheme():
    assert refusal(mixed(), **INPUTS, formats=formats(budget=3.4)) == (
        "formats.mixed.allocate.budget: 3.4 stored bits per weight are fewer than those of the smallest scheme, "
        "'int3 group-64' with 3.5 on model 'm'"
    )


def test_only_targets_with_a_scheme_per_linear_hold_an_allocation():
    given = grid(mixed(), schemes=SCHEMES[:3])
    cell = next(
        cell for cell in cells(mixed(), **INPUTS, formats=formats(schemes=SCHEMES[:3])) if cell.format == "mixed"
    )
    verdicts = {
        target: planned_verdict(given, cell, target) for target in ("compressed-tensors", "gguf", "gptq", "dense")
    }
    assert [verdict.kind for verdict in verdicts.values()] == ["bound", "refused", "refused", "bound"]
    assert "several schemes" in verdicts["gguf"].text() and "vLLM" in verdicts["compressed-tensors"].loaders
    apart = grid(mixed(), schemes=SCHEMES[:3], groups="linear")
    assert "groups: fused" in planned_verdict(apart, cell, "compressed-tensors").excluded["vLLM"]


def test_races_and_labels_know_the_bits_of_an_allocation():
    given = grid(mixed(), alternatives=2)
    found = [cell for cell in expand_studies(given) if cell.granularity == MIXED]
    assert [races.planned_bits(given, cell) for cell in found] == [5.0, 5.0]
    assert {races.deployment_kind(given, cell) for cell in found} == {"w5a16"}
    assert deployments.bits(given["formats"], "mixed-a2", MIXED).label == "W3-8A16"
    assert deployments.bits(given["formats"], "mixed", MIXED).rounded == "weights"
    small = grid(mixed(), budget=None, objective="bits", divergence=0.1)
    cell = next(cell for cell in expand_studies(small) if cell.granularity == MIXED)
    assert races.planned_bits(small, cell) == pytest.approx(8.04, abs=0.05)
