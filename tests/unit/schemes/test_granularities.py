"""Rounding by a format entry of a config: granularities of weights and activations, by head, static
scales, candidates, keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkouts import ROOT
from quantgrid.config import cell_checks, entries, grid, validation
from quantgrid.config.cells import baseline
from quantgrid.ground.errors import ConfigError
from quantgrid.models.plans import SITES
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.schemes.granularity import Granularity

HEAD = 16


def schemes(granularity: str = "channel", preset: str = "int4", **entry) -> dict:
    return cell_schemes({"preset": preset, **entry}, granularity, "formats.f", HEAD)


def test_a_preset_gives_one_scheme_to_every_site_and_none_to_keys_and_values():
    found = schemes("group-32")
    assert found == json.loads(json.dumps(found))
    assert found["weight"] == scheme("int4", group_size=32).to_dict() and found["key_value"] is None
    assert found["activation"] == {site: [activation_scheme("int4", group_size=32).to_dict()] for site in SITES}
    assert (
        schemes(preset="w4a16")["activation"] == schemes(activation=None)["activation"] == {}
        and schemes(weight=None)["weight"] is None
    )


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group-64"])
@pytest.mark.parametrize(
    "weight, activation",
    [("channel", "group-32"), ("group-16", "token"), ("tensor", "channel"), ("group-32", "tensor")],
)
def test_weights_and_activations_have_their_own_granularity_whatever_that_of_the_cell(granularity, weight, activation):
    found = schemes(granularity, weight={"granularity": weight}, activation={"granularity": activation})
    assert found["weight"] == scheme("int4", granularity=weight).to_dict()
    assert all(
        candidates == [activation_scheme("int4", granularity=activation).to_dict()]
        for candidates in found["activation"].values()
    )
    assert schemes(granularity, weight={"group_size": 8})["weight"]["group_size"] == 8


@pytest.mark.parametrize(
    "granularity, group", [("channel", HEAD), ("group-32", HEAD), ("group-16", 16), ("group-8", 8), ("tensor", None)]
)
def test_by_head_cuts_what_is_wider_than_a_head_at_one_site(granularity, group):
    plain, by_head = schemes(granularity), schemes(granularity, activation={"by_head": True})
    assert by_head["weight"] == plain["weight"] and schemes(granularity, activation={"by_head": False}) == plain
    for site in SITES:
        wanted = plain["activation"][site][0]
        if site == "output_input" and group:
            wanted = activation_scheme("int4", group_size=group).to_dict()
        assert by_head["activation"][site] == [wanted], site


def test_candidates_differ_in_their_element_alone():
    found = schemes(preset="int4_sym", activation={"element": ["int4", "e2m1"], "by_head": True})["activation"]
    for site, candidates in found.items():
        assert [candidate["element"] for candidate in candidates] == ["int4", "e2m1"]
        assert {**candidates[0], "element": "e2m1"} == candidates[1]
        assert candidates[0]["group_size"] == (HEAD if site == "output_input" else None)


def test_keys_and_values_take_the_activation_scheme_of_a_preset_whatever_the_granularity_of_the_cell():
    for granularity in ("tensor", "channel", "group-64"):
        assert schemes(granularity, key_value={})["key_value"] == {
            "scheme": activation_scheme("int4").to_dict(),
            "rotate_keys": False,
        }
    found = schemes(key_value={"preset": "int8", "symmetric": True, "group_size": 8, "rotate_keys": True})["key_value"]
    assert found == {"scheme": activation_scheme("int8", symmetric=True, group_size=8).to_dict(), "rotate_keys": True}
    assert schemes(weight=None, activation=None, key_value={})["key_value"]
    assert (
        schemes(preset="nf4", key_value={"preset": "fp4", "element": "nf4"})["key_value"]["scheme"]["element"] == "nf4"
    )


@pytest.mark.parametrize("entry, message", [
    ({"weight": {"by_head": True}}, r"formats\.f\.weight: unknown field of a quantization scheme 'by_head'"),
    ({"weight": {"scale_format": "e4m3", "global_scale": "static"}}, r"formats\.f\.weight: global_scale 'static' comes "
        r"from calibration"),
    ({"activation": {"element": ["int4", "int9"]}}, r"formats\.f\.activation: unknown element 'int9'"),
    ({"key_value": {"preset": "w4a16"}}, r"formats\.f\.key_value: preset 'w4a16' has no activation scheme.*: fp4"),
    ({"key_value": {"preset": "int9"}}, r"formats\.f\.key_value: preset 'int9'"),
    ({"key_value": {"granularity": "tensor"}}, r"formats\.f\.key_value: keys and values are rounded token by token"),
    ({"key_value": {"preset": "nvfp4", "global_scale": "static"}}, "token by token"),
    ({"key_value": {"preset": "nvfp4", "global_scale": "tensor"}}, "token by token"),
])  # fmt: skip
def test_contradictions_are_refused_with_their_key(entry, message):
    with pytest.raises(ConfigError, match=message):
        schemes(**entry)


def smoke(formats: dict, **study) -> dict:
    """The smoke config with these formats and one study of them."""
    import yaml

    content = yaml.safe_load((Path(ROOT) / "config" / "smoke.yaml").read_text())
    study = {
        "models": ["reference-1m-planted"],
        "transforms": ["none"],
        "mitigations": ["rtn"],
        "granularities": ["native"],
        "formats": list(formats),
        **study,
    }
    return {**content, "formats": formats, "studies": {"study": study}, "report": {}}


def test_a_config_resolves_by_head_with_the_head_size_of_its_model():
    config = validation.check(smoke({"heads": {"preset": "int4", "activation": {"by_head": True}}}))
    (cell,) = [cell for cell in grid.expand_studies(config) if cell.quantized]
    found = entries.resolved_schemes(config, cell)["activation"]
    assert found["output_input"][0]["group_size"] == 32 and found["attention_input"][0]["group_size"] is None
    assert not any(entries.resolved_schemes(config, baseline("reference-1m-planted")).values())


@pytest.mark.parametrize("entry, message", [
    ({"preset": "int4", "activation": {"group_size": 40}}, r"group size 40 of formats\.f\.activation does not divide "
                                                           r"the 128 inputs of site"),
    ({"preset": "int4", "key_value": {"group_size": 12}},
     r"formats\.f\.key_value on model 'reference-1m-planted': group size 12 does not divide the 32"),
    ({"preset": "mxfp4", "activation": {"by_head": True}}, "blocks of 32 by definition, so by_head contradicts it"),
    ({"preset": "mxfp4", "activation": {"group_size": 16}}, r"formats\.f\.activation: preset 'mxfp4' has blocks of 32"),
    ({"preset": "w4a16", "activation": {"by_head": True}}, r"formats\.f\.activation: preset 'w4a16' leaves activations "
                                                           r"in full precision"),
    ({"preset": "int4", "weight": None, "activation": None}, r"formats\.f: rounds neither weights nor activations"),
    ({"preset": "int4", "activation": {"by_head": 1}}, r"formats\.f\.activation\.by_head: 1 is of the wrong type; "
                                                       r"expected boolean"),
    ({"preset": "int4", "key_value": {"element": ["int4", "int8"]}}, r"formats\.f\.key_value\.element: .* is of the "
        r"wrong type"),
    ({"preset": "int4", "key_value": {"rotate": True}}, "unknown field of a quantization scheme 'rotate'"),
])  # fmt: skip
def test_a_config_is_refused_before_any_job(entry, message):
    with pytest.raises(ConfigError, match=message):
        validation.check(smoke({"f": entry}))


def test_an_odd_head_has_no_hadamard_matrix():
    with pytest.raises(ConfigError, match="rotate_keys needs a Hadamard matrix of order 18"):
        sizes = SimpleNamespace(key_dim=18, head_dim=16)
        cell_checks.check_key_value(schemes(key_value={"rotate_keys": True})["key_value"], sizes, "here")


@pytest.mark.parametrize("name", ["tensor", "channel", "group-1", "group-64", "group-999999999"])
def test_a_granularity_is_parsed_once_and_written_as_it_was_named(name):
    parsed = Granularity.parse(name)
    assert str(parsed) == name and Granularity(**dict(zip(("kind", "group_size"), parsed.fields.values()))) == parsed
    assert str(Granularity.of_block(parsed.group_size)) == ("channel" if name == "tensor" else name)


@pytest.mark.parametrize("name", ["group-0", "group-064", "group-1234567890", "group", "token", "", None, 64])
def test_other_granularities_are_refused_with_the_accepted_ones(name):
    with pytest.raises(ConfigError, match="mine: unknown granularity .*Accepted: tensor, channel, group-N"):
        Granularity.parse(name, "mine")
