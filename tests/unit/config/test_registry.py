"""Entries of published methods, and costs of mitigations."""

from __future__ import annotations

import pytest

from quantgrid.config import entries, registry
from quantgrid.ground.errors import ConfigError


def test_published_names_are_entries_that_a_config_may_replace():
    for axis, published in registry.PUBLISHED.items():
        for name, entry in published.items():
            assert entries.entry({}, axis, name) == entry and name in entries.known_names({}, axis)
            assert registry.method(axis, entry["method"]).resolve(entry, name)["method"] == entry["method"]
    mine = {"transforms": {"spinquant": {"method": "optimized_rotation", "steps": 3}}}
    assert entries.entry(mine, "transforms", "spinquant") == mine["transforms"]["spinquant"]
    assert entries.entry({}, "transforms", "spinquant")["gradient"] == "identity"  # as published
    assert entries.entry({}, "mitigations", "gptq") == {"method": "gptq"}  # a method keeps its defaults


@pytest.mark.parametrize(
    ("axis", "typed", "meant"),
    [
        ("transforms", "smothquant", "smoothquant"),
        ("transforms", "hadamrd", "hadamard"),
        ("transforms", "spinqant", "spinquant"),
        ("transforms", "quarrot", "quarot"),
        ("mitigations", "gptq-published", "gptq_published"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(axis, typed, meant):
    assert entries.entry_names({}, axis, meant, axis) == [meant]
    with pytest.raises(ConfigError, match=f"unknown .* '{typed}' - did you mean '{meant}'"):
        entries.entry_names({}, axis, typed, axis)


@pytest.mark.parametrize(
    ("name", "options", "costs"),
    [
        ("rtn", {}, set()),
        ("gptq", {}, {"solve"}),
        ("low_rank", {}, {"decompose"}),
        ("gptq_low_rank", {"base": "mr_gptq"}, {"solve", "decompose"}),
        ("low_rank_first", {"base": "rtn"}, {"decompose"}),
        ("sparse_outliers", {"base": "rtn"}, set()),
        ("sparse_outliers", {"base": "gptq"}, {"solve"}),
        ("residual_columns", {"base": "rtn"}, set()),
        ("residual_columns", {"base": "gptq"}, {"solve"}),
        ("tune_scales", {"base": "gptq"}, {"solve"}),
        ("learned_rounding", {"base": "gptq"}, {"solve"}),
        ("qat_finetune", {"base": "mr_gptq"}, {"solve"}),
        ("tune_scales", {"base": "rtn"}, set()),
    ],
)
def test_costs_are_those_of_the_method_and_of_its_base(name, options, costs):
    assert registry.costs(name, options) == costs


@pytest.mark.parametrize(
    ("stated", "rate"),
    [({}, 0.005), ({"steps": 1000}, 0.001), ({"steps": 0}, 1.0), ({"steps": 100, "learning_rate": 0.005}, 0.005)],
)
def test_the_learning_rate_of_learned_rounding_is_one_over_the_steps_unless_stated(stated, rate):
    resolved = registry.method("mitigations", "learned_rounding").resolve({"method": "", **stated}, "mine")["options"]
    assert resolved["learning_rate"] == rate
