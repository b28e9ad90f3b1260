"""Refused cells: unknown names, block sizes, Hadamard orders, missing mitigations, models with
experts."""

from __future__ import annotations

import pytest

from grid_cases import ALL_GRANULARITIES, cells, config, refusal, study, transform
from quantgrid.config import entries, registry
from quantgrid.config.cell_checks import check_cell
from quantgrid.config.cells import AXES, Cell, baseline
from quantgrid.config.grid import expand_studies
from quantgrid.ground.errors import ConfigError
from quantgrid.schemes import PRESETS, scheme


@pytest.mark.parametrize(
    ("axis", "name", "hint"),
    [
        ("models", "mm", "did you mean 'm'? Accepted: m, n"),
        ("transforms", "scalling", "'scaling'"),
        ("mitigations", "gptqq", "'gptq'"),
        ("formats", "nvpf4", "'nvfp4'"),
        ("granularities", "group128", "tensor, channel, group-N"),
    ],
)
def test_an_unknown_name_is_refused_with_the_key_and_what_is_accepted(axis, name, hint):
    message = refusal(study(**{axis: [name]}))
    assert message.startswith(f"studies.a.{axis}: unknown {AXES[axis]} '{name}'") and hint in message


@pytest.mark.parametrize("name", ["group-0", "group-064", "group-", "group-6.4", "row", "-", ""])
def test_a_malformed_granularity_is_refused(name):
    assert f"unknown granularity '{name}'" in refusal(study(granularities=[name]))


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset["block"]])
def test_a_block_format_takes_its_own_block_only(preset):
    block = PRESETS[preset]["block"]
    shape = {"hidden_size": 1024, "heads": 16, "kv_heads": 4}
    for granularity in (*ALL_GRANULARITIES, f"group-{block}"):
        given = study(granularities=[granularity], formats=[preset])
        if granularity in ("native", f"group-{block}"):
            assert cells(given, shape=shape)[-1].granularity == f"group-{block}"
        else:
            message = refusal(given)
            assert message.startswith(
                f"studies.a: format '{preset}' has blocks of {block} by definition, so granularity '{granularity}'"
            )
            assert f"use 'group-{block}' or 'native'" in message


def test_a_contradicting_pair_may_be_excluded():
    given = study(
        granularities=["group-16", "group-32"],
        formats=["int4", "nvfp4"],
        exclude=[{"format": "nvfp4", "granularity": "group-32"}],
    )
    assert len(cells(given)) == 4


@pytest.mark.parametrize(
    ("group", "shape", "site", "inputs", "fitting"),
    [
        (128, {}, "attention_input", 576, "16, 32, 48, 64, 96, 192"),
        (192, {"heads": 8, "kv_heads": 8}, "output_input", 512, "16, 32, 64"),
        (64, {"intermediate_size": 1504}, "down_input", 1504, "16, 32"),
        (32, {"intermediate_size": 1530}, "down_input", 1530, "none"),
    ],
)
def test_a_group_size_has_to_divide_every_site_and_the_message_says_which_do(group, shape, site, inputs, fitting):
    message = refusal(study(granularities=[f"group-{group}"]), shape=shape)
    assert message == (
        f"studies.a: granularity 'group-{group}' does not divide the {inputs} inputs of site '{site}' of model 'm'; "
        f"group sizes that fit all its sites: {fitting}"
    )


def test_a_block_format_has_to_divide_every_site_too():
    assert "granularity 'group-32' does not divide the 1520 inputs of site 'down_input'" in refusal(
        study(granularities=["native"], formats=["mxfp4"]), shape={"intermediate_size": 1520}
    )
    assert cells(study(granularities=["native"], formats=["nvfp4"]), shape={"intermediate_size": 1520})


def test_a_mitigation_refuses_a_model_whose_linears_are_too_wide_for_it():
    wide = {"intermediate_size": 65536}
    message = refusal(study(mitigations=["sparse_outliers"]), shape=wide)
    assert message == (
        "studies.a: mitigation 'sparse_outliers' takes linears of at most 65535 inputs, model 'm' has 65536; "
        "use 'low_rank' or 'gptq_low_rank' for this model"
    )
    assert cells(study(mitigations=["low_rank"]), shape=wide) and cells(study(mitigations=["sparse_outliers"]))


@pytest.mark.parametrize("tensor", ["weight", "activation"])
def test_a_group_size_of_a_format_entry_is_checked_as_well(tensor):
    message = refusal(
        study(formats=["mine"]), formats={"mine": {"preset": "int4", tensor: {"granularity": "group-128"}}}
    )
    assert message.startswith(
        f"studies.a: group size 128 of formats.mine.{tensor} does not divide the 576 inputs of site 'attention_input'"
    )
    assert (
        len(cells(study(formats=["mine"]), formats={"mine": {"preset": "int4", tensor: {"granularity": "group-64"}}}))
        == 2
    )


@pytest.mark.parametrize(("size", "order"), [("head_dim", 92), ("hidden_size", 582), ("intermediate_size", 1180)])
def test_a_rotation_needs_hadamard_matrices_that_exist(size, order):
    """92 = 4 x 23, 582 = 2 x 291 and 1180 = 4 x 295 are the order of no Hadamard matrix that
    Sylvester's and Paley's constructions reach."""
    message = refusal(study(transforms=["random_hadamard"]), shape={size: order})
    assert message.startswith(
        f"studies.a: transform 'random_hadamard' needs a Hadamard matrix of order {order} ({size} of model 'm')"
    )
    assert "use 'scaling' or 'none'" in message
    assert len(cells(study(transforms=["scaling"]), shape={size: order})) == 2
    assert "needs a Hadamard matrix" in refusal(
        study(transforms=["random_hadamard"], formats=["bf16"]), shape={size: order}
    )


@pytest.mark.parametrize(
    ("method", "options", "shape", "missing"),
    [
        ("quarot", {}, {}, "9 (heads"),
        ("quarot", {}, {"heads": 14}, "14 (heads"),
        ("rotation_then_scaling", {}, {"hidden_size": 582}, "582 (hidden_size"),
        ("random_hadamard", {"rotations": ["R2"]}, {"head_dim": 92}, "92 (head_dim"),
        ("random_orthogonal", {}, {"intermediate_size": 1180}, "1180 (intermediate_size"),
        ("random_orthogonal", {"heads": "hadamard"}, {"head_dim": 92}, "92 (head_dim"),
    ],
)
def test_a_transform_is_refused_where_its_hadamard_matrix_does_not_exist(method, options, shape, missing):
    message = refusal(study(transforms=["t"]), shape=shape, **transform(method, **options))
    assert f"transform 't' needs a Hadamard matrix of order {missing} of model 'm')" in message and "; use '" in message
    if method == "quarot":
        assert message.endswith("use 'random_hadamard', which mixes no heads, or 'mixing: orthogonal' for this model")


@pytest.mark.parametrize(
    ("method", "options", "shape"),
    [
        ("quarot", {"mixing": "orthogonal"}, {}),
        ("quarot", {}, {"heads": 12, "kv_heads": 3}),
        ("random_hadamard", {"rotations": ["R1", "R2"]}, {"intermediate_size": 1180}),
        ("random_hadamard", {"rotations": ["R4"]}, {"hidden_size": 582}),
        (
            "random_orthogonal",
            {"rotations": ["R1", "R2"]},
            {"hidden_size": 582, "head_dim": 92, "intermediate_size": 1180},
        ),
    ],
)
def test_what_a_transform_asks_of_a_model_depends_on_its_options(method, options, shape):
    assert len(cells(study(transforms=["t"]), shape=shape, **transform(method, **options))) == 2


def test_blocks_of_a_transform_have_to_divide_its_sites():
    message = refusal(study(transforms=["duquant"]))
    assert message == (
        "studies.a: blocks of 128 of transform 'duquant' do not divide the 576 inputs of site 'attention_input' of "
        "model 'm'; "
        "values of block_size that fit its sites: 16, 24, 32, 48, 64, 96, 192"
    )
    message = refusal(study(transforms=["t"]), **transform("block_hadamard", block_size=128))
    assert message.endswith("values of block_size that fit its sites: 16, 32, 64")
    assert len(cells(study(transforms=["t"]), **transform("block_hadamard", block_size=128, sites=["down_input"]))) == 2
    assert len(cells(study(transforms=["t"]), **transform("duquant", block_size=64))) == 2
    message = refusal(study(transforms=["block_hadamard"]), shape={"intermediate_size": 1530})
    assert message.endswith("values of block_size that fit its sites: none, use 'scaling' or 'none'")


def test_a_quantized_format_needs_a_mitigation():
    message = refusal(study(mitigations=["none"]))
    assert message.startswith("studies.a: mitigation 'none' with format 'int4'; a quantized format takes one of ")
    assert {"gptq", "low_rank", "rtn"} <= set(message.partition("one of ")[2].split(", "))
    assert len(cells(study(mitigations=["none"], formats=["bf16"]))) == 1


def test_a_study_without_a_cell_is_refused():
    axes = "models, transforms, mitigations, granularities, formats"
    for given in (study(exclude=[{"mitigation": "rtn"}]), study(formats=[]), {}):
        assert refusal(given).startswith(f"studies.a: the study has no cells; give each of {axes} at least one value")
    assert refusal(study(), study(exclude=[{"model": ["m", "n"]}])).startswith("studies.b: the study has no cells")


def test_a_cell_is_checked_by_itself():
    given = config(study())
    check_cell(given, Cell("m", "none", "rtn", "group-64", "int4"), "here")
    with pytest.raises(ConfigError, match=r"here: granularity 'group-128' does not divide"):
        check_cell(given, Cell("m", "none", "rtn", "group-128", "int4"), "here")
    with pytest.raises(ConfigError, match=r"transforms\.spin\.method: unknown method 'spin'"):
        check_cell(given, Cell("m", "spin", "rtn", "channel", "int4"), "here")


def test_schemes_are_resolved_once_per_format_and_granularity():
    given = config(study(), formats={"mine": {"preset": "int4", "weight": {"range": "mse"}, "activation": None}})
    found = entries.resolved_schemes(given, Cell("m", "none", "rtn", "group-64", "mine"))
    assert found["activation"] == {} and found["key_value"] is None
    assert found["weight"] == scheme("int4", granularity="group", group_size=64, range="mse").to_dict()
    assert entries.resolved_schemes(given, baseline("m")) == {"weight": None, "activation": {}, "key_value": None}


SPARSE = {
    "architecture": "Qwen2MoeForCausalLM",
    "hidden_size": 512,
    "heads": 8,
    "kv_heads": 4,
    "experts": 8,
    "active_experts": 2,
    "expert_size": 256,
    "shared_size": 128,
    "dense_layers": [0],
}


@pytest.mark.parametrize(
    "entry", [{"method": "gptaq"}, {"method": "sparse_outliers", "base": "gptaq", "propagation": "sequential"}], ids=str
)
def test_paired_statistics_are_refused_on_models_with_experts(entry):
    of = study(mitigations=["x"])
    with pytest.raises(
        ConfigError,
        match=r"studies\.a.*mitigation 'x' compares inputs with those of the unquantized model.*experts of 'm'.*'gptq'",
    ):
        expand_studies(config(of, shape=SPARSE, mitigations={"x": entry}))
    assert len(expand_studies(config(of, mitigations={"x": entry}))) == 2


@pytest.mark.parametrize("dense", [[30], [-1], ["0"], 0])
def test_dense_layers_are_numbers_of_layers(dense):
    with pytest.raises(ConfigError, match=r"models\.m\.shape\.dense_layers: .* is not a list of layers from 0 to 29"):
        expand_studies(config(study(), shape={**SPARSE, "dense_layers": dense}))


@pytest.mark.parametrize("dense", [[0], []], ids=["the first layer has none", "every layer has some"])
def test_all_other_methods_are_accepted_on_models_with_experts(dense):
    transforms = sorted(registry.METHODS["transforms"])
    mitigations = sorted(set(registry.METHODS["mitigations"]) - {"gptaq", "none"})
    for of in (study(transforms=transforms), study(mitigations=mitigations)):
        shape = {**SPARSE, "dense_layers": dense}
        found = {(cell.transform, cell.mitigation) for cell in expand_studies(config(of, shape=shape))}
        assert len(found) == max(len(of["transforms"]), len(of["mitigations"])) + 1


@pytest.mark.parametrize("name", sorted(name for name in registry.METHODS["mitigations"] if name != "none"))
def test_shared_global_scales_are_refused_for_mitigations_that_do_not_share_them(name):
    given = study(mitigations=[name], formats=["nvfp4_served"], granularities=["native"])
    if registry.METHODS["mitigations"][name].shares_scales:
        assert cells(given)[-1].mitigation == name
    else:
        message = refusal(given)
        assert f"and mitigation '{name}' does not; mitigations that do: rtn, gptq, mr_gptq, gptaq, low_rank" in message
