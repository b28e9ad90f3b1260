"""Formats that round some linears alone (``linears``): what is chosen computes as if all were, the
rest as if nothing was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkouts import ROOT
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.config import entries, grid, validation
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.inference.transform import fit
from quantgrid.learning.transformed import TransformedModel
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import LINEARS, SITE_OF, SITES
from quantgrid.quantization.cached import Recipe, quantize_decoder, summarize
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.quantization.sequential import Sequential, quantize_sequentially
from quantgrid.reporting.data.naming import names
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.transforms.recipes import random_hadamard
from reference_decoder import site_inputs
from reference_statistics import write_statistics
from tiny_decoders import CASES, bare_name, random_tokens, save

INT4 = {site: [activation_scheme("int4")] for site in SITES}
CHOICES = [("q",), ("k", "down"), ("o",), tuple(linear for linear in LINEARS if linear != "gate"), LINEARS]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    case = next(case for case in CASES if case.bias and case.tied)
    config, state = case.build(torch.float32)
    folder, tokens = save(tmp_path_factory.mktemp("model"), config, state), random_tokens(config, 6, 24)
    statistics = write_statistics(folder / "statistics", site_inputs(state, config, tokens))
    return DecoderFolder(folder), statistics, tokens


def recipe(given, schemes, mitigation=rtn):
    decoder, statistics, _ = given
    return Recipe(fit(random_hadamard.primitives(1), decoder, statistics), schemes, mitigation, str(statistics))


def loaded(done, folder):
    folder.mkdir()
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return load_quantized(folder, torch.float64)


@pytest.mark.parametrize("chosen", CHOICES, ids=" ".join)
def test_chosen_linears_are_those_of_the_rounded_model_and_the_rest_those_of_the_other(chosen, given, tmp_path):
    done = quantize_decoder(given[0], recipe(given, CellSchemes(scheme("int4"), INT4, linears=chosen)))
    found = loaded(done, tmp_path / "some")
    rounded = loaded(quantize_decoder(given[0], recipe(given, CellSchemes(scheme("int4"), INT4))), tmp_path / "all")
    plain = loaded(quantize_decoder(given[0], recipe(given, CellSchemes(), None)), tmp_path / "none")
    for layer in range(2):
        for number, linear in enumerate(LINEARS):
            x = torch.randn(
                1,
                5,
                given[0].shape.site_size(SITE_OF[linear]),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(number),
            )
            own, other = (rounded, plain) if linear in chosen else (plain, rounded)
            outputs = [model.get_submodule(bare_name(layer, linear))(x.clone()) for model in (found, own, other)]
            assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], rtol=1e-3), (
                layer,
                linear,
            )
    assert read_json(tmp_path / "some" / "quantgrid.json")["rounded"] == list(chosen)
    bits = [done.errors[f"1.{linear}"]["bits"] for linear in LINEARS]
    assert [value < 16 for value in bits] == [linear in chosen for linear in LINEARS]
    assert min(bits) <= summarize(done.errors)["bits"] <= max(bits)


@pytest.mark.parametrize("quantized_activations", [False, True])
def test_sequential_statistics_behind_linears_that_are_not_rounded_are_those_of_calibration(
    quantized_activations, given
):
    seen = {}

    def recording(weight, statistics, scheme):
        seen.setdefault(name, []).append(statistics.second_moment[0])
        return gptq(weight, statistics, scheme)

    schemes = CellSchemes(scheme("int4"), {"output_input": INT4["output_input"]}, linears=("o",))
    name = "sequential"
    done = quantize_sequentially(
        given[0], recipe(given, schemes, recording), Sequential(given[2], quantized_activations=quantized_activations)
    )
    name = "cached"
    quantize_decoder(given[0], recipe(given, schemes, recording))
    assert len(seen["sequential"]) == 2  # one linear of each of the two layers
    first, wanted = seen["sequential"][0], seen["cached"][0]
    if not quantized_activations:
        assert (first - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert sorted(done.content.linears) == [bare_name(layer, "o") for layer in range(2)]
    assert done.content.tensors[f"{bare_name(0, 'q')}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("chosen", CHOICES, ids=" ".join)
def test_sequential_quantization_rounds_what_is_chosen(chosen, given):
    """Rounding reads no statistics, so the codes are those of cached quantization."""
    schemes = CellSchemes(scheme("int4"), INT4, linears=chosen)
    done = quantize_sequentially(given[0], recipe(given, schemes), Sequential(given[2]))
    wanted = quantize_decoder(given[0], recipe(given, schemes))
    assert sorted(done.content.linears) == sorted(wanted.content.linears)
    assert done.content.tensors.keys() == wanted.content.tensors.keys()
    assert all(torch.equal(tensor, wanted.content.tensors[name]) for name, tensor in done.content.tensors.items())


def entry(**fields):
    return cell_schemes({"preset": "int4", **fields}, "channel", "formats.f", 16)


def test_sites_without_a_chosen_linear_are_not_rounded():
    found = entry(linears=["v", "k", "up"])
    assert found["linears"] == ["k", "v", "up"] and list(found["activation"]) == ["attention_input", "mlp_input"]
    assert CellSchemes.from_dict(json.loads(json.dumps(found))).linears == ("k", "v", "up")
    assert entry(linears=list(LINEARS)) == entry() and CellSchemes.from_dict(entry()).linears == LINEARS
    assert names({"formats": {"f": {"preset": "int4", "linears": ["q"]}}}, "format", "f") == {"f"}


def smoke(**study):
    import yaml

    content = yaml.safe_load((Path(ROOT) / "config" / "smoke.yaml").read_text())
    content["formats"] = {
        "only-o": {"preset": "int4", "linears": ["o"]},
        "only-x": {"preset": "int4", "linears": ["o"]},
        **study.pop("entries", {}),
    }
    study = {
        "models": ["reference-1m-planted"],
        "transforms": ["none"],
        "mitigations": ["rtn"],
        "granularities": ["channel"],
        "formats": ["only-o"],
        **study,
    }
    return {**content, "studies": {"study": study}, "report": {}}


def test_what_trains_rounds_every_linear():
    with pytest.raises(ConfigError, match="rounds every linear; use one without 'linears'"):
        TransformedModel(Recipe(None, CellSchemes(scheme("int4"), INT4, linears=("o",)), None, None), None, "range")


def test_a_config_chooses_linears_and_refuses_what_it_cannot():
    config = validation.check(smoke())
    (cell,) = [cell for cell in grid.expand_studies(config) if cell.quantized]
    assert entries.resolved_schemes(config, cell)["linears"] == ["o"]
    with pytest.raises(
        ConfigError, match="transform 'flatquant' is fitted to every linear being rounded, format 'only-o' rounds some"
    ):
        validation.check(smoke(transforms=["flatquant"]))
    for name in ("tune_scales", "qat_finetune"):
        with pytest.raises(
            ConfigError,
            match=f"mitigation '{name}' trains with every linear rounded, format 'only-o' rounds some .* such as "
            f"'gptq'",
        ):
            validation.check(smoke(mitigations=[name]))
    with pytest.raises(ConfigError, match=r"formats\.f\.linears\.0: 'queries' is not accepted"):
        validation.check(smoke(entries={"f": {"preset": "int4", "linears": ["queries"]}}))
    with pytest.raises(ConfigError, match="rounds neither weights nor activations"):
        validation.check(smoke(entries={"f": {"preset": "int4", "weight": None, "activation": None, "linears": ["q"]}}))
    validation.check(
        smoke(entries={"f": {"preset": "int4", "linears": ["down"]}}, formats=["f"], granularities=["group-64"])
    )  # others: 96 inputs


@pytest.mark.parametrize(
    "name, weight, activation",
    [("int5", 5, 5), ("int7", 7, 7), ("w8a16", 8, None), ("w16a4", None, 4), ("w16a8", None, 8)],
)
def test_presets_of_one_side_and_of_every_width(name, weight, activation):
    found = cell_schemes({"preset": name}, "channel", "formats.f")
    assert (found["weight"] and found["weight"]["element"]) == (weight and f"int{weight}")
    assert {scheme["element"] for site in found["activation"].values() for scheme in site} == (
        {f"int{activation}"} if activation else set()
    )
