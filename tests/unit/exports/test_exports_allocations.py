"""Exports of linears with several schemes: one config group per scheme, loaded by transformers with equal logits."""

from __future__ import annotations

import pytest

from export_cases import BF16
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.exports.export import export
from quantgrid.exports.packed_cell import PackedCell
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import save_quantized
from quantgrid.quantization.linear_groups import linear_groups
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes

CANDIDATES = {
    "int4 group-32": scheme("int4", granularity="group-32", **BF16),
    "int4 group-64": scheme("int4", granularity="group-64", **BF16),
    "int8": scheme("int8", **BF16),
}


def packed(source, folder, groups="fused"):
    """Checkpoint folder of a cell with the candidates in turns over groups of linears."""
    decoder = DecoderFolder(source.model)
    several = enumerate(linear_groups(decoder.shape, groups))
    chosen = {linear: [*CANDIDATES][number % 3] for number, group in several for linear in group}
    schemes = CellSchemes(candidates=CANDIDATES).allocated(chosen)
    done = quantize_decoder(decoder, Recipe(fit([], decoder, None), schemes, rtn, str(source.statistics)))
    folder.mkdir()
    axes = {"axes": {"transform": "none", "mitigation": "rtn", "format": "test", "granularity": "mixed"}}
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", axes)
    return folder


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_an_allocation_loads_with_equal_logits_and_its_fused_linears_share_a_group(sources, tmp_path, architecture):
    source = sources(architecture, intermediate_size=128)
    report = export(
        source.model, packed(source, tmp_path / "cell"), None, source.windows, "compressed-tensors", tmp_path / "out"
    )
    assert report["check"]["max_logit_difference"] == 0 and "vLLM" in report["verdict"]["loaders"]
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]
    shown = {(group["weights"]["num_bits"], group["weights"].get("group_size")) for group in groups.values()}
    assert shown == {(4, 32), (4, 64), (8, None)} and {group["format"] for group in groups.values()} == {
        "pack-quantized"
    }
    targets = {name: number for number, group in groups.items() for name in group["targets"]}
    for name, group in targets.items():
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if name.endswith(parts):
                stem = name.rpartition(".")[0]
                assert {targets.get(f"{stem}.{part}", group) for part in parts} == {group}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "group of 32" in card and "group of 64" in card and "w4a16" in card and "w8a16" in card


def test_linears_of_different_schemes_exclude_what_fuses_them(sources, tmp_path):
    source = sources("LlamaForCausalLM", intermediate_size=128)
    apart = packed(source, tmp_path / "apart", "linear")
    assert not PackedCell(apart).features().schemes.tied
    report = export(source.model, apart, None, source.windows, "compressed-tensors", tmp_path / "out")
    assert report["check"]["max_logit_difference"] == 0 and "groups: fused" in report["verdict"]["excluded"]["vLLM"]
    joined = sources("Phi3ForCausalLM", intermediate_size=128)
    with pytest.raises(ConfigError, match="several of the cell, in several schemes"):
        export(
            joined.model, packed(joined, tmp_path / "joined", "linear"), None, joined.windows, "compressed-tensors",
            tmp_path / "other",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="the linears of the cell have several schemes"):
        export(source.model, apart, None, source.windows, "gptq", tmp_path / "gptq")
