"""Kinds of deployment: bits of formats, presets and entries alike, and the recipes that a kind holds."""

from __future__ import annotations

import pytest

from quantgrid import schemes
from quantgrid.config.deployments import DEPLOYMENTS, bits, deployment, present
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.style import recipe_label, value_label

FORMATS = {
    "grouped": {"preset": "w4a16", "weight": {"granularity": "group", "group_size": 64}},
    "activations": {"preset": "int4", "weight": None},
    "mine": {"preset": "int4", "activation": None},
    "cached": {"preset": "w4a16", "key_value": {"preset": "int8"}},
    "either": {"preset": "int4_sym", "activation": {"element": ["int4", "e4m3"]}},
    "only-inputs": {"preset": "int8", "weight": None},
}


@pytest.mark.parametrize(
    ("name", "label", "rounded"),
    [
        ("int4", "W4A4", "weights-activations"),
        ("w4a16_g64", "W4A16", "weights"),
        ("w4a8", "W4A8", "weights-activations"),
        ("w16a4", "W16A4", "activations"),
        ("nvfp4", "W4A4", "weights-activations"),
        ("mxfp6", "W6A6", "weights-activations"),
        ("kmeans3", "W3A16", "weights"),
        ("mine", "W4A16", "weights"),
        ("cached", "W4A16KV8", "weights-activations"),
        ("either", "W4A8", "weights-activations"),
        ("only-inputs", "W16A8", "activations"),
    ],
)
def test_bits_and_kind_of_a_format(name, label, rounded):
    found = bits(FORMATS, name, "channel")
    assert found.label == label and found.rounded == rounded


def test_every_preset_has_bits():
    for name in schemes.PRESETS:
        assert (bits({}, name, "channel").rounded == "") == (name == "bf16")
    assert bits({}, "bf16", "-").rounded == ""


def test_a_format_of_another_config_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="unknown format 'mne' - did you mean 'mine'.*name the config"):
        bits(FORMATS, "mne", "channel")


def test_a_kind_with_online_operations_holds_those_without_too():
    assert DEPLOYMENTS["weights+online"].holds("weights", False) and DEPLOYMENTS["weights+online"].holds(
        "weights", True
    )
    assert DEPLOYMENTS["weights"].holds("weights", False) and not DEPLOYMENTS["weights"].holds("weights", True)
    assert not DEPLOYMENTS["weights+online"].holds("weights-activations", False)
    kinds = present([("weights-activations", True), ("weights", False), ("weights-activations", True)])
    assert [kind.name for kind in kinds] == ["weights", "weights-activations+online"]
    assert deployment("weights").title == "weights only, no online operations"
    with pytest.raises(ConfigError, match="DEPLOYMENT: unknown deployment 'weight' - did you mean 'weights'"):
        deployment("weight")


@pytest.mark.parametrize(
    ("axes", "label"),
    [
        (("none", "gptq", "group-64", "w4a16_g64"), "W4A16 g64 GPTQ"),
        (("none", "gptq", "group-64", "w4a16"), "W4A16 group-64 GPTQ"),
        (("hadamard", "gptq-low-rank", "channel", "int4"), "W4A4 INT4 channel hadamard + GPTQ + low-rank"),
        (("none", "rtn", "group-32", "mxfp4_served"), "W4A4 mxfp4_served group-32 RTN"),
        (("turn", "rtn", "channel", "mine"), "W4A16 mine channel turn + RTN"),
        (("none", "rtn", "channel", "w4a4_served"), "W4A4 served channel RTN"),
        (("none", "rtn", "channel", "grouped"), "W4A16 grouped group-64 RTN"),
        (("none", "rtn", "channel", "activations"), "W16A4 activations channel RTN"),
    ],
)
def test_labels_of_recipes_carry_the_bits(axes, label):
    named = dict(zip(("transform", "mitigation", "granularity", "format"), axes))
    assert recipe_label({"model": "m", **named}, FORMATS) == label


def test_labels_of_all_presets_differ():
    labels = [value_label("format", name) for name in schemes.PRESETS]
    assert len(set(labels)) == len(labels) and value_label("format", "int4") == "W4A4 INT4"
