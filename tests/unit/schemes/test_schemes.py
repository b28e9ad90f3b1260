"""Schemes are plain data that cannot contradict themselves; presets, overrides and the accounting
of bits."""

import json

import pytest

from quantgrid.ground.errors import ConfigError
from quantgrid.schemes import PRESETS, QuantScheme, activation_scheme, scheme

WITH_WEIGHTS = [name for name, preset in PRESETS.items() if preset["weight"] is not None]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_presets_are_valid_and_survive_json(name):
    for found in (scheme(name), activation_scheme(name)):
        if found is not None:
            assert QuantScheme.from_dict(json.loads(json.dumps(found.to_dict()))) == found
            assert (found.granularity == "group") == (PRESETS[name]["block"] is not None)


def test_definitions_of_the_presets():
    assert scheme("mxfp4") == QuantScheme("e2m1", "e8m0", "group", 32, scale_rule="floor")
    assert scheme("nvfp4") == QuantScheme("e2m1", "e4m3", "group", 16, global_scale="tensor")
    assert activation_scheme("nvfp4").global_scale == "token"
    assert scheme("int4").symmetric and not activation_scheme("int4").symmetric
    assert not scheme("int4_asym").symmetric and activation_scheme("int4_sym").symmetric
    assert activation_scheme("w4a16") is None and activation_scheme("nf4") is None and activation_scheme("bf16") is None
    assert activation_scheme("w4a8").element == "int8"


def test_spellings_of_groups():
    expected = QuantScheme("int4", granularity="group", group_size=64)
    assert scheme("int4", granularity="group-64") == scheme("int4", group_size=64) == expected
    assert (
        scheme("int4", granularity="group", group_size=64)
        == scheme("int4", granularity="group-64", group_size=64)
        == expected
    )
    assert scheme("mxfp4", granularity="channel").group_size is None
    assert activation_scheme("int4", granularity="token").granularity == "channel"


def test_an_overridden_scale_format_brings_its_rule_and_global_scale():
    assert scheme("fp4", scale_format="e8m0").scale_rule == "floor"
    assert scheme("fp4", scale_format="e8m0", scale_rule="rceil").scale_rule == "rceil"
    assert scheme("nvfp4", scale_format="e8m0").global_scale == "none"
    assert scheme("mxfp4", scale_format="e4m3").scale_rule == "nearest"
    assert scheme("mxfp4", scale_format="e4m3").global_scale == "tensor"
    assert activation_scheme("mxfp4", scale_format="e2m1").global_scale == "token"
    assert scheme("mxfp4", scale_format="e4m3", global_scale="none").global_scale == "none"
    assert scheme("int4", scale_format="fp16").global_scale == "none"
    assert scheme("nvfp4", scale_format="e4m3", global_scale="static").global_scale == "static"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"element": "int9"}, "unknown element 'int9'"),
        ({"element": "int4", "scale_format": "fp31"}, "did you mean 'fp32'"),
        ({"element": "int4", "granularity": "row"}, "unknown granularity"),
        ({"element": "int4", "granularity": "group"}, "needs a group_size"),
        ({"element": "int4", "group_size": 32}, "contradicts granularity"),
        ({"element": "int4", "granularity": "group", "group_size": 0}, "positive integer"),
        ({"element": "int4", "granularity": "group", "group_size": 32.0}, "positive integer"),
        ({"element": "e2m1", "symmetric": False}, "asymmetric quantization is defined for int"),
        ({"element": "nf4", "symmetric": False}, "asymmetric quantization is defined for int"),
        ({"element": "kmeans4", "symmetric": False}, "asymmetric quantization is defined for int"),
        ({"element": "ue2m2"}, "needs a zero point, symmetric: false"),
        ({"element": "kmeans4", "range": "mse"}, "accepts only range 'minmax' and clip_ratio 1"),
        ({"element": "kmeans4", "clip_ratio": 0.9}, "accepts only range 'minmax' and clip_ratio 1"),
        ({"element": "kmeans5"}, "did you mean 'kmeans4'"),
        ({"element": "e2m1", "range": "exhaustive"}, "scales of at most 8 bits .e8m0, e5m2, e4m3"),
        ({"element": "int4", "scale_format": "e4m3", "range": "exhaustive"}, "signed float elements"),
        ({"element": "e2m1", "scale_format": "e4m3", "range": "exhaustive", "clip_ratio": 0.9}, "tries every scale"),
        ({"element": "int4", "seed": -1}, "seed is -1: an integer of at least 0"),
        ({"element": "int4", "symmetric": "no"}, "true or false"),
        ({"element": "int4", "qmax": 8}, "accepts 7 or 7.5"),
        ({"element": "e2m1", "qmax": 7}, "qmax"),
        ({"element": "int4", "symmetric": False, "qmax": 7}, "qmax is accepted for symmetric"),
        ({"element": "e2m1", "scale_format": "e8m0"}, "which accepts: floor"),
        ({"element": "e2m1", "scale_rule": "floor"}, "contradicts scale_format 'fp32'"),
        (
            {"element": "e2m1", "scale_format": "e8m0", "scale_rule": "floor", "global_scale": "tensor"},
            "accepts no global_scale",
        ),
        ({"element": "e2m1", "global_scale": "tensor"}, "accepts no global_scale"),
        ({"element": "int4", "clip_ratio": 0}, "clip_ratio"),
        ({"element": "int4", "clip_ratio": float("nan")}, "clip_ratio"),
        ({"element": "int4", "percentile": 101}, "percentile"),
        ({"element": "int4", "mse_steps": 0}, "mse_steps"),
        (
            {"element": "int4", "range": "mse", "trim_high": 0.5},
            "trim_high is 0.5: a number of at least 0 and below 0.5",
        ),
        ({"element": "int4", "range": "mse", "trim_low": True}, "trim_low is True: a number"),
        ({"element": "int4", "trim_high": 0.1}, "trim_low and trim_high contradict range 'minmax'"),
        (
            {"element": "e2m1", "scale_format": "e4m3", "range": "exhaustive", "trim_low": 0.1},
            "contradict range 'exhaustive'",
        ),
        ({"element": "int4", "group": 32}, "unknown field"),
        ({"scale_format": "fp32"}, "needs the field 'element'"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        QuantScheme.from_dict(fields)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scheme("mxpf4"), "did you mean 'mxfp4'"),
        (lambda: activation_scheme("mxpf4"), "did you mean 'mxfp4'"),
        (lambda: scheme("bf16"), "no weight scheme"),
        (lambda: activation_scheme("int4", element="kmeans4", symmetric=True), "for weights only"),
        (lambda: scheme("int4", granularity="group-64", group_size=32), "contradicts group_size 32"),
        (lambda: scheme("int4", granularity="channel", group_size=32), "contradicts granularity"),
        (lambda: scheme("int4", scale_format="fp7"), "unknown scale_format"),
        (lambda: scheme("int4", group=64), "unknown field"),
        (
            lambda: scheme("int4", granularity="group-48").scale_shape((4, 576 + 8)),
            "does not divide the last dimension 584; accepted: 2, 4, 8",
        ),
    ],
)
def test_refusals_of_presets(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    "name, overrides, expected",
    [
        *[("int4", {"group_size": g, "scale_format": "fp32"}, 4 + 32 / g) for g in (32, 64, 128, 256, 512)],
        *[("int4", {"group_size": g, "scale_format": "fp16"}, 4 + 16 / g) for g in (32, 64, 128, 256, 512)],
        *[("int4_asym", {"group_size": g, "scale_format": "fp16"}, 4 + 20 / g) for g in (32, 64, 128, 256, 512)],
        ("int4", {}, 4.015625),
        ("fp4", {}, 4.015625),
        ("mxfp4", {}, 4.25),
        ("mxfp4", {"group_size": 16}, 4.5),
        ("nvfp4", {}, 4.5 + 32 / (1024 * 2048)),
        ("nvfp4", {"global_scale": "token"}, 4.5 + 32 / 2048),
        ("nvfp4", {"group_size": 32}, 4.25 + 32 / (1024 * 2048)),
        ("nvfp4", {"scale_format": "e2m1"}, 4.25 + 32 / (1024 * 2048)),
        ("int4", {"granularity": "tensor"}, 4 + 32 / (1024 * 2048)),
    ],
)
def test_bits_per_element_of_methods_section_4(name, overrides, expected):
    assert scheme(name, **overrides).bits_per_element((1024, 2048)) == expected
    assert scheme(name, **overrides).bits_per_element((3, 1024, 2048)) == expected
