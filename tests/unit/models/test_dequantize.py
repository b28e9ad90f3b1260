"""Models in MXFP4: dequantized once while they are fetched, to the numbers that transformers computes with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from family_models import build, some_tokens
from quantgrid.evaluation.gates import Agreement, own_logits, streamed_logits
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import read_json, write_json
from quantgrid.models.dequantize import dequantized
from quantgrid.models.fetch import fetch
from quantgrid.models.folders import check_folder, shape_of

TOKENIZER = ROOT / "tests" / "data" / "tiny-llama" / "tokenizer.json"
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny GPT-OSS with random codes in its experts."""
    made = build("GptOssForCausalLM", tmp_path_factory.mktemp("mxfp4") / "model", intermediate_size=64)
    shutil.copy(TOKENIZER, made)
    tensors, generator = load_file(made / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, n, m = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            256, (experts, m, n // 32, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            122, 126, (experts, m, n // 32), dtype=torch.uint8, generator=generator
        )
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    write_json(made / "config.json", {**read_json(made / "config.json"), "quantization_config": QUANTIZED})
    return made


def entry(folder: Path, **more: str) -> dict[str, str]:
    return {"source": "local", "path": str(folder), **more}


def test_codes_are_decoded_as_by_transformers():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 64, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (3, 64, 2), dtype=torch.uint8, generator=generator)
    assert torch.equal(dequantized(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@torch.no_grad()
def test_a_model_in_mxfp4_is_fetched_in_bfloat16(folder, tmp_path):
    assert shape_of(entry(folder, dequantize="mxfp4")).experts == 5
    found = fetch(entry(folder, dequantize="mxfp4", note="tiny"), tmp_path / "fetched")
    assert found["note"] == "tiny; dequantized from MXFP4: rounded before quantgrid saw it"
    assert found["source_sha256"] != found["weights_sha256"] and found["dtype"] == "BF16+F32"
    stored, packed = load_file(tmp_path / "fetched" / "model.safetensors"), load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    wanted = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    assert torch.equal(stored[name], wanted) and not any(name.endswith(("_blocks", "_scales")) for name in stored)
    assert all(torch.equal(stored[name], packed[name]) for name in stored.keys() & packed.keys())
    tokens = some_tokens()
    logits = streamed_logits(tmp_path / "fetched", tokens)
    assert Agreement.of(logits, own_logits(tmp_path / "fetched", tokens), tokens).logits < 1e-5


def test_what_cannot_be_dequantized_is_refused_by_name(folder, tmp_path):
    with pytest.raises(ConfigError, match="already quantized .mxfp4.* set dequantize: mxfp4, or dequantize it once"):
        check_folder(folder)
    with pytest.raises(ConfigError, match="m.dequantize: unknown format 'fp8'. Accepted: mxfp4"):
        shape_of(entry(folder, dequantize="fp8"), "m")
    with pytest.raises(ConfigError, match="m.dequantize: only models with source local or hub are dequantized"):
        shape_of({"source": "builtin", "name": "reference-1m", "dequantize": "mxfp4"}, "m")
    plain = build("GptOssForCausalLM", tmp_path / "plain")
    shutil.copy(TOKENIZER, plain)
    with pytest.raises(ConfigError, match="m.path: no tensor of this model is stored in MXFP4; leave out 'dequantize'"):
        shape_of(entry(plain, dequantize="mxfp4"), "m")
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"] = torch.zeros(5, 64, 3, dtype=torch.uint8)
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"down_proj_blocks' is U8 \(5, 64, 2, 16\) with scales U8 \(5, 64, 3\)"):
        shape_of(entry(spoilt, dequantize="mxfp4"), "m")
