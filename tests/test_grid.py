"""The grid: how studies expand into cells, which cells are refused and with which words, and how many cells each shipped config has."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantgrid import grid, schemes
from quantgrid.config import check
from quantgrid.errors import ConfigError
from quantgrid.grid import Cell, baseline, check_cell, expand_studies, study_cells

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"architecture": "LlamaForCausalLM", "hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
         "vocabulary": 49152}
ALL_GRANULARITIES = ["tensor", "channel", "group-32", "group-16", "native"]


def study(**changes: Any) -> dict[str, Any]:
    """A study of one cell, with changes; an axis is given as a list."""
    return {"models": ["m"], "transforms": ["none"], "mitigations": ["rtn"], "granularities": ["channel"], "formats": ["int4"], **changes}


def config(*studies: dict[str, Any], shape: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    """What the grid reads of a config: models ``m`` and ``n`` of one shape, entries of the axes, studies named a, b, ..."""
    model = {"source": "hub", "id": "owner/name", "revision": "main", "shape": {**SHAPE, **(shape or {})}}
    return {"models": {"m": model, "n": model}, **entries, "studies": dict(zip("abcdef", studies))}


def cells(*studies: dict[str, Any], **entries: Any) -> list[Cell]:
    return expand_studies(config(*studies, **entries))


def refusal(*studies: dict[str, Any], **entries: Any) -> str:
    """The message with which the grid refuses the studies."""
    with pytest.raises(ConfigError) as caught:
        cells(*studies, **entries)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- what a study expands to --------------------------------------------------------------------------------------------------------------


def test_a_study_is_the_product_of_its_axes_after_its_baselines_in_the_order_of_the_config():
    axes = {"models": ["n", "m"], "transforms": ["scaling", "none"], "mitigations": ["rtn", "gptq"], "granularities": ["group-32", "channel"],
            "formats": ["int8", "int4"]}
    found = cells(axes)
    assert found[:2] == [baseline("n"), baseline("m")]
    assert found[2:] == [Cell(*values) for values in product(*axes.values())]
    assert len(found) == len(set(found)) == 2 + 2**5


def test_a_cell_names_its_axes_and_its_path():
    cell = Cell("m", "none", "gptq", "group-32", "int4")
    assert cell.axes == {"model": "m", "transform": "none", "mitigation": "gptq", "granularity": "group-32", "format": "int4"}
    assert cell.path == "m/none/gptq/group-32/int4" and cell.quantized
    assert baseline("m") == Cell("m", "none", "none", "-", "bf16") and not baseline("m").quantized


def test_an_also_block_states_only_the_axes_that_differ():
    found = cells(study(mitigations=["rtn", "gptq"], also=[{"transforms": ["scaling"], "mitigations": ["gptq"]}, {"formats": ["bf16"]}]))
    assert found == [baseline("m"), Cell("m", "none", "rtn", "channel", "int4"), Cell("m", "none", "gptq", "channel", "int4"),
                     Cell("m", "scaling", "gptq", "channel", "int4")]


def test_also_alone_may_complete_a_study():
    given = study(also=[{"formats": ["int8"]}])
    del given["formats"]
    assert cells(given)[1:] == [Cell("m", "none", "rtn", "channel", "int8")]


@pytest.mark.parametrize(("exclude", "left"), [
    ([{"format": "int8"}], [("rtn", "int4"), ("gptq", "int4")]),
    ([{"format": "int8", "mitigation": "gptq"}], [("rtn", "int4"), ("rtn", "int8"), ("gptq", "int4")]),
    ([{"format": ["int8", "int4"], "mitigation": "gptq"}], [("rtn", "int4"), ("rtn", "int8")]),
    ([{"format": "int8", "mitigation": "rtn"}, {"format": "int4", "mitigation": "gptq"}], [("rtn", "int4"), ("gptq", "int8")]),
    ([{"model": "n"}], [("rtn", "int4"), ("rtn", "int8"), ("gptq", "int4"), ("gptq", "int8")]),
])
def test_exclude_removes_the_cells_that_match_every_axis_of_a_pattern(exclude, left):
    found = cells(study(mitigations=["rtn", "gptq"], formats=["int4", "int8"], exclude=exclude))
    assert [(cell.mitigation, cell.format) for cell in found[1:]] == left


def test_exclude_acts_on_also_blocks_but_never_on_the_baseline():
    found = cells(study(also=[{"transforms": ["scaling"]}], exclude=[{"transform": "scaling"}, {"format": "bf16"}]))
    assert found == [baseline("m"), Cell("m", "none", "rtn", "channel", "int4")]


def test_exclude_understands_native_and_seeded_names():
    rotations = {"rotation": {"method": "random_hadamard", "seeds": [3, 5]}}
    found = cells(study(granularities=["native", "group-16"], formats=["int4", "nvfp4"], transforms=["none", "rotation"],
                        exclude=[{"granularity": "native", "format": "int4"}, {"transform": "rotation", "format": "nvfp4"}]), transforms=rotations)
    assert {(cell.transform, cell.granularity, cell.format) for cell in found[1:]} == {
        ("none", "group-16", "int4"), ("none", "group-16", "nvfp4"), ("rotation-s3", "group-16", "int4"), ("rotation-s5", "group-16", "int4")}


def test_bf16_leaves_nothing_to_mitigate_and_no_granularity():
    found = cells(study(transforms=["none", "scaling"], mitigations=["rtn", "gptq"], granularities=["tensor", "native"], formats=["bf16"]))
    assert found == [baseline("m"), Cell("m", "scaling", "none", "-", "bf16")]


@pytest.mark.parametrize(("preset", "granularity"), [("int4", "channel"), ("fp4", "channel"), ("nf4", "channel"), ("mxfp4", "group-32"),
                                                    ("nvfp4", "group-16"), ("mxint4", "group-32"), ("nvint4", "group-16"), ("bf16", "-")])
def test_native_is_the_block_of_a_format_or_one_scale_per_channel(preset, granularity):
    assert cells(study(granularities=["native"], formats=[preset]))[-1].granularity == granularity
    entry = {"mine": {"preset": preset, "weight": {"range": "mse"}}}
    assert preset == "bf16" or cells(study(granularities=["native"], formats=["mine"]), formats=entry)[-1].granularity == granularity


def test_native_merges_with_the_granularity_that_it_stands_for():
    assert len(cells(study(granularities=["channel", "native"]))) == 2
    assert len(cells(study(granularities=["group-16", "native"], formats=["nvfp4"]))) == 2


def test_a_list_of_seeds_expands_to_names_and_each_name_to_its_entry():
    entries = {"rotation": {"method": "random_hadamard", "seeds": [0, 7]}, "fixed": {"method": "random_hadamard", "seed": 7}}
    given = config(study(transforms=["rotation", "fixed", "none"]), transforms=entries)
    assert [cell.transform for cell in expand_studies(given)] == ["none", "rotation-s0", "rotation-s7", "fixed", "none"]
    assert grid.entry(given, "transforms", "rotation-s7") == {"method": "random_hadamard", "seed": 7}
    assert grid.entry(given, "transforms", "fixed") == entries["fixed"] and "seeds" in entries["rotation"]
    assert grid.entry(given, "transforms", "rotation-s8") == {"method": "rotation-s8"}  # no such seed: no such entry


def test_names_need_an_entry_only_where_they_are_not_those_of_methods_and_presets():
    given = config(study())
    assert grid.entry(given, "mitigations", "gptq") == {"method": "gptq"} and grid.entry(given, "formats", "int4") == {"preset": "int4"}
    given["formats"] = {"int4": {"preset": "int4", "weight": {"range": "mse"}}}
    assert grid.entry(given, "formats", "int4") == given["formats"]["int4"]


def test_shared_cells_are_there_once_in_the_order_in_which_studies_name_them():
    one, two = study(mitigations=["gptq", "rtn"]), study(mitigations=["rtn", "gptq"], formats=["int8", "int4"])
    given = config(one, two)
    assert len(study_cells(given, "a")) == 3 and len(study_cells(given, "b")) == 5
    assert [(cell.mitigation, cell.format) for cell in expand_studies(given)] == [
        ("none", "bf16"), ("gptq", "int4"), ("rtn", "int4"), ("rtn", "int8"), ("gptq", "int8")]


def test_what_a_study_names_is_listed_with_its_place():
    given = study(also=[{"formats": ["int8"]}], exclude=[{"format": "int8", "mitigation": ["rtn", "gptq"]}])
    assert [(axis, name, key) for axis, name, key in grid.names_in(given)][-4:] == [
        ("formats", "int8", "also.0.formats"), ("mitigations", "rtn", "exclude.0.mitigation"), ("mitigations", "gptq", "exclude.0.mitigation"),
        ("formats", "int8", "exclude.0.format")]


def test_the_grid_needs_the_standard_library_only():
    code = ("import sys; from quantgrid.grid import expand_studies;"
            "assert not {'torch', 'numpy', 'yaml', 'pandas', 'safetensors', 'transformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts")
    assert done.returncode == 0, done.stderr


# -- which cells are refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "name", "hint"), [("models", "mm", "did you mean 'm'? Accepted: m, n"), ("transforms", "scalling", "'scaling'"),
                                                   ("mitigations", "gptqq", "'gptq'"), ("formats", "nvpf4", "'nvfp4'"),
                                                   ("granularities", "group128", "tensor, channel, group-N")])
def test_an_unknown_name_is_refused_with_the_key_and_what_is_accepted(axis, name, hint):
    message = refusal(study(**{axis: [name]}))
    assert message.startswith(f"studies.a.{axis}: unknown {grid.AXES[axis]} '{name}'") and hint in message


@pytest.mark.parametrize("name", ["group-0", "group-064", "group-", "group-6.4", "row", "-", ""])
def test_a_malformed_granularity_is_refused(name):
    assert f"unknown granularity '{name}'" in refusal(study(granularities=[name]))


@pytest.mark.parametrize("preset", [name for name, preset in schemes.PRESETS.items() if preset["block"]])
def test_a_block_format_takes_its_own_block_only(preset):
    block = schemes.PRESETS[preset]["block"]
    for granularity in ALL_GRANULARITIES:
        given = study(granularities=[granularity], formats=[preset])
        if granularity in ("native", f"group-{block}"):
            assert cells(given)[-1].granularity == f"group-{block}"
        else:
            message = refusal(given)
            assert message.startswith(f"studies.a: format '{preset}' has blocks of {block} by definition, so granularity '{granularity}'")
            assert f"use 'group-{block}' or 'native'" in message


def test_a_contradicting_pair_may_be_excluded():
    given = study(granularities=["group-16", "group-32"], formats=["int4", "nvfp4"], exclude=[{"format": "nvfp4", "granularity": "group-32"}])
    assert len(cells(given)) == 4


@pytest.mark.parametrize(("group", "shape", "site", "inputs", "fitting"), [
    (128, {}, "attention_input", 576, "16, 32, 48, 64, 96, 192"),
    (192, {"heads": 8, "kv_heads": 8}, "output_input", 512, "16, 32, 64"),
    (64, {"intermediate_size": 1504}, "down_input", 1504, "16, 32"),
    (32, {"intermediate_size": 1530}, "down_input", 1530, "none"),
])
def test_a_group_size_has_to_divide_every_site_and_the_message_says_which_do(group, shape, site, inputs, fitting):
    message = refusal(study(granularities=[f"group-{group}"]), shape=shape)
    assert message == (f"studies.a: granularity 'group-{group}' does not divide the {inputs} inputs of site '{site}' of model 'm'; "
                       f"group sizes that fit all its sites: {fitting}")


def test_a_block_format_has_to_divide_every_site_too():
    assert "granularity 'group-32' does not divide the 1520 inputs of site 'down_input'" in refusal(
        study(granularities=["native"], formats=["mxfp4"]), shape={"intermediate_size": 1520})
    assert cells(study(granularities=["native"], formats=["nvfp4"]), shape={"intermediate_size": 1520})


def test_a_mitigation_refuses_a_model_whose_linears_are_too_wide_for_it():
    wide = {"intermediate_size": 65536}
    message = refusal(study(mitigations=["sparse_outliers"]), shape=wide)
    assert message == ("studies.a: mitigation 'sparse_outliers' takes linears of at most 65535 inputs, model 'm' has 65536; "
                       "use 'low_rank' or 'gptq_low_rank' for this model")
    assert cells(study(mitigations=["low_rank"]), shape=wide) and cells(study(mitigations=["sparse_outliers"]))


@pytest.mark.parametrize("tensor", ["weight", "activation"])
def test_a_group_size_of_a_format_entry_is_checked_as_well(tensor):
    message = refusal(study(formats=["mine"]), formats={"mine": {"preset": "int4", tensor: {"granularity": "group-128"}}})
    assert message.startswith(f"studies.a: group size 128 of formats.mine.{tensor} does not divide the 576 inputs of site 'attention_input'")
    assert len(cells(study(formats=["mine"]), formats={"mine": {"preset": "int4", tensor: {"granularity": "group-64"}}})) == 2


@pytest.mark.parametrize(("size", "order"), [("head_dim", 92), ("hidden_size", 582), ("intermediate_size", 1180)])
def test_a_rotation_needs_hadamard_matrices_that_exist(size, order):
    """92 = 4 x 23, 582 = 2 x 291 and 1180 = 4 x 295 are the order of no Hadamard matrix that Sylvester's and Paley's constructions reach."""
    message = refusal(study(transforms=["random_hadamard"]), shape={size: order})
    assert message.startswith(f"studies.a: transform 'random_hadamard' needs a Hadamard matrix of order {order} ({size} of model 'm')")
    assert "use 'scaling' or 'none'" in message
    assert len(cells(study(transforms=["scaling"]), shape={size: order})) == 2
    assert "needs a Hadamard matrix" in refusal(study(transforms=["random_hadamard"], formats=["bf16"]), shape={size: order})


def transform(method: str, **options: Any) -> dict[str, Any]:
    """Entries of one transform named ``t``."""
    return {"transforms": {"t": {"method": method, **options}}}


@pytest.mark.parametrize(("method", "options", "shape", "missing"), [
    ("quarot", {}, {}, "9 (heads"), ("quarot", {}, {"heads": 14}, "14 (heads"),
    ("rotation_then_scaling", {}, {"hidden_size": 582}, "582 (hidden_size"),
    ("random_hadamard", {"rotations": ["R2"]}, {"head_dim": 92}, "92 (head_dim"),
    ("random_orthogonal", {}, {"intermediate_size": 1180}, "1180 (intermediate_size"),
    ("random_orthogonal", {"heads": "hadamard"}, {"head_dim": 92}, "92 (head_dim")])
def test_a_transform_is_refused_where_its_hadamard_matrix_does_not_exist(method, options, shape, missing):
    message = refusal(study(transforms=["t"]), shape=shape, **transform(method, **options))
    assert f"transform 't' needs a Hadamard matrix of order {missing} of model 'm')" in message and "; use '" in message
    if method == "quarot":
        assert message.endswith("use 'random_hadamard', which mixes no heads, or 'mixing: orthogonal' for this model")


@pytest.mark.parametrize(("method", "options", "shape"), [
    ("quarot", {"mixing": "orthogonal"}, {}), ("quarot", {}, {"heads": 12, "kv_heads": 3}),
    ("random_hadamard", {"rotations": ["R1", "R2"]}, {"intermediate_size": 1180}), ("random_hadamard", {"rotations": ["R4"]}, {"hidden_size": 582}),
    ("random_orthogonal", {"rotations": ["R1", "R2"]}, {"hidden_size": 582, "head_dim": 92, "intermediate_size": 1180})])
def test_what_a_transform_asks_of_a_model_depends_on_its_options(method, options, shape):
    assert len(cells(study(transforms=["t"]), shape=shape, **transform(method, **options))) == 2


def test_blocks_of_a_transform_have_to_divide_its_sites():
    message = refusal(study(transforms=["duquant"]))
    assert message == ("studies.a: blocks of 128 of transform 'duquant' do not divide the 576 inputs of site 'attention_input' of model 'm'; "
                       "values of block_size that fit its sites: 16, 24, 32, 48, 64, 96, 192")
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
        assert refusal(given).startswith(f"studies.a: no cell is left; give each of {axes} at least one value")
    assert refusal(study(), study(exclude=[{"model": ["m", "n"]}])).startswith("studies.b: no cell is left")


def test_a_cell_is_checked_by_itself():
    given = config(study())
    check_cell(given, Cell("m", "none", "rtn", "group-64", "int4"), "here")
    with pytest.raises(ConfigError, match=r"here: granularity 'group-128' does not divide"):
        check_cell(given, Cell("m", "none", "rtn", "group-128", "int4"), "here")
    with pytest.raises(ConfigError, match=r"transforms\.spin\.method: unknown method 'spin'"):
        check_cell(given, Cell("m", "spin", "rtn", "channel", "int4"), "here")


def test_schemes_are_resolved_once_per_format_and_granularity():
    given = config(study(), formats={"mine": {"preset": "int4", "weight": {"range": "mse"}, "activation": None}})
    found = grid.resolved_schemes(given, Cell("m", "none", "rtn", "group-64", "mine"))
    assert found["activation"] == {} and found["key_value"] is None
    assert found["weight"] == schemes.scheme("int4", granularity="group", group_size=64, range="mse").to_dict()
    assert grid.resolved_schemes(given, baseline("m")) == {"weight": None, "activation": {}, "key_value": None}


# -- the shipped configs ------------------------------------------------------------------------------------------------------------------

COUNTS = {
    # config: (distinct cells, cells per study, distinct transforms, mitigations and formats among the quantized cells)
    "config": (108, {"transforms-mitigations": 60, "formats": 36, "transforms-formats": 10, "group-size": 18, "symmetry": 16}, (3, 4, 6)),
    "formats": (57, {"granularity": 19, "symmetry": 9, "formats": 17, "scale-formats": 14, "activation-options": 9}, (2, 3, 21)),
    "smoke": (40, {"methods": 8, "pairs": 19, "formats": 14, "granularity": 3}, (20, 17, 13)),
    "oddities": (91, {"gptq-statistics": 27, "gptq-depth": 12, "gptq-linears": 12, "gptq-both-sides": 12, "rotation-parts": 30, "rotation-groups": 14,
                      "four-bit-origin": 6, "first-token-activations": 5, "first-token-ranges": 6}, (5, 8, 10)),
    "transforms": (111, {"transforms": 105, "scaling": 23, "rotation": 43, "principal-axes": 17, "blocks": 19, "learned": 27,
                         "rotation-sites": 11, "groups": 7, "costs": 8}, (52, 2, 1)),
    "mitigations": (164, {"mitigations": 151, "low-rank-on-gptq": 61, "options": 10, "propagation": 13, "finish": 5}, (3, 21, 3)),
    "paper": (226, {"decomposition": 16, "transforms-mitigations": 31, "models": 15, "symmetry": 5, "group-size": 17, "formats": 33,
                    "transforms-formats": 25, "two-level-scales": 11, "scale-formats": 21, "block-rotations": 31, "propagation": 17,
                    "calibration": 5, "low-rank": 8, "bit-width": 15, "sides": 7, "components": 16, "seeds": 17, "overhead": 9, "depth": 11},
              (25, 17, 36)),
    "shifts": (27, {"shifts": 27}, (14, 1, 1)),
    "studies": (264, {"decomposition": 21, "transforms-mitigations": 86, "models": 14, "symmetry": 15, "group-size": 25, "formats": 43,
                      "transforms-formats": 39, "two-level-scales": 11, "scale-formats": 16, "block-rotations": 20, "propagation": 11,
                      "calibration": 6, "low-rank": 8, "bit-width": 12, "sides": 21, "components": 16, "seeds": 18, "overhead": 9, "depth": 17},
                (20, 21, 36)),
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
    assert tuple(len({getattr(cell, axis) for cell in quantized}) for axis in ("transform", "mitigation", "format")) == distinct
    assert Counter(cell.model for cell in found if not cell.quantized).keys() == set(checked["models"])
    assert all(baseline(model) in found for model in checked["models"])


def test_unchecked_and_checked_configs_expand_to_the_same_cells(shipped):
    content = shipped[1]
    assert expand_studies(content) == expand_studies(check(content))


@pytest.mark.parametrize("name", ["config", "paper"])
def test_the_default_and_the_paper_config_are_wide_enough(name):
    quantized = [cell for cell in expand_studies(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())) if cell.quantized]
    assert len(quantized) >= 20
    for axis, least in {"transform": 3, "mitigation": 4, "format": 4}.items():
        assert len({getattr(cell, axis) for cell in quantized}) >= least
