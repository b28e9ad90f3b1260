"""Verdicts of GGUF: exact, bound or refused, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gguf_cases import FORMATS, NVFP4, Q4_0
from grid_cases import SHAPE
from quantgrid.exports.features import Features
from quantgrid.exports.gguf_capabilities import ROUNDED_INPUTS
from quantgrid.exports.targets import judge
from quantgrid.exports.verdicts import BOUND, EXACT, REFUSED, Verdict
from quantgrid.models.shapes import ModelShape
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes

FP16 = {"scale_format": "fp16"}


def verdict(
    entry: dict[str, Any], granularity: str = "group-32", shape: dict[str, Any] | None = None, **more
) -> Verdict:
    schemes = CellSchemes.from_dict(cell_schemes(entry, granularity, "test"))
    return judge("gguf", Features(ModelShape(**{**SHAPE, **(shape or {})}), schemes, **more))


@pytest.mark.parametrize("name", [*FORMATS, "NVFP4"])
def test_weights_in_the_same_blocks_are_exact_and_inputs_are_not(name: str):
    found = verdict({**FORMATS, "NVFP4": NVFP4}[name])
    assert found.kind == BOUND and found.bounds[0] == ROUNDED_INPUTS
    assert len(found.bounds) == (2 if name == "Q4_1" else 1)
    assert found.loaders == ("llama.cpp",) and (found.kl > 0) == (name == "Q4_1")


def test_only_a_file_without_quantized_linears_is_exact():
    assert verdict({"preset": "bf16"}).text() == EXACT


@pytest.mark.parametrize("bits, stored", [(2, 4), (3, 4), (6, 8), (7, 8)])
def test_narrow_codes_grow_and_the_verdict_says_so(bits: int, stored: int):
    found = verdict({"preset": f"int{bits}", "weight": FP16, "activation": None})
    assert found.bounds == (ROUNDED_INPUTS,)
    assert any(f"int{bits} codes take {stored} bits each" in note for note in found.notes)


@pytest.mark.parametrize("scale_format, part", [("fp32", "2^-11 relative"), ("bf16", "below 2^-17")])
def test_scales_of_other_formats_are_within_a_bound(scale_format: str, part: str):
    found = verdict({"preset": "int4", "weight": {"scale_format": scale_format}, "activation": None}, "channel")
    assert found.kind == BOUND and part in found.text()


@pytest.mark.parametrize(
    "entry, granularity, more, part",
    [
        ({"preset": "int4", "weight": FP16}, "group-32", {}, "activation: null"),
        (Q4_0, "group-16", {}, "nearest: multiples of 32"),
        ({"preset": "int8", "activation": None, "weight": {"symmetric": False}}, "channel", {}, "asymmetric int8"),
        ({"preset": "nf4"}, "group-32", {}, "no GGML type holds nf4"),
        ({"preset": "fp8", "activation": None}, "channel", {}, "no GGML type holds e4m3"),
        (
            {"preset": "mxfp4", "activation": None, "weight": {"scale_rule": "four_thirds"}},
            "channel",
            {},
            "four_thirds",
        ),
        (
            {"preset": "nvfp4", "activation": None, "weight": {"global_scale": "token"}},
            "channel",
            {},
            "global_scale token",
        ),
        (Q4_0, "group-32", {"online": {"down_input": ("hadamard",)}}, "hadamard at down_input"),
        (Q4_0, "group-32", {"branch_inputs": frozenset({"quantized"})}, "low-rank terms"),
        (Q4_0, "group-32", {"outliers": True}, "outliers"),
        (Q4_0, "group-32", {"shape": {"architecture": "GemmaForCausalLM"}}, "GemmaForCausalLM has no mapping"),
        (Q4_0, "group-32", {"shape": {"architecture": "Qwen3ForCausalLM"}, "biased": ("o",)}, "a bias of o"),
        (NVFP4, "channel", {"shape": {"intermediate_size": 1504}}, r"blocks of 64, and inputs have 1504 \(down\)"),
    ],
    ids=lambda value: None,
)
def test_refusals_name_the_reason_and_the_nearest_recipe(entry: dict, granularity: str, more: dict, part: str):

    found = verdict(entry, granularity, **more)
    assert found.kind == REFUSED and not found.loaders
    assert re.search(part, found.text()), found.text()
    assert all("nearest: " in reason for reason in found.refusals)


def test_biases_of_a_shift_are_read_by_the_llama_architecture():
    assert verdict(Q4_0, biased=("v", "down")).bounds == (ROUNDED_INPUTS,)


def test_a_rounded_cache_is_lost_and_named():
    found = verdict({**Q4_0, "key_value": {"preset": "int8"}})
    assert found.bounds == (ROUNDED_INPUTS,) and "KV cache" in found.losses[0]
