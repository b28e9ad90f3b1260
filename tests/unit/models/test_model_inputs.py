"""Model folders that people bring: what is missing, mistaken or absurd is refused in one line, in
bounded time and memory."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plan_cases
from input_cases import edit_json, tiny
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.models import fetch, folders

SECONDS, MEBIBYTES = 10, 300


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A spoiler that edits the tensors of a folder."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def header(content: bytes, length: int | None = None) -> Callable[[Path], Any]:
    """A spoiler that writes a safetensors file of this header, announced as ``length`` bytes."""
    return lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(content) if length is None else length) + content
    )


def sparse(folder: Path) -> None:
    """A header of 60 GB by its length, in a file that is as large and takes no room."""
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 60 * 10**9))
        file.truncate(61 * 10**9)


def untied(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)


def sharded(weight_map: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / folders.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def in_fp8(held: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Weight ``name`` in the FP8 layout of transformers."""
    return {name: held[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(2, 1)}


def in_mxfp4(held: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Weight ``name`` in the MXFP4 layout of GPT-OSS, in place of the weight itself."""
    m, n = held.pop(name).shape
    parts = {"blocks": (m, n // 32, 16), "scales": (m, n // 32)}
    return {f"{name}_{part}": torch.zeros(size, dtype=torch.uint8) for part, size in parts.items()}


FIRST = "model.layers.0."
REMEDY = (
    r".*name the full-precision checkpoint it was made from, (set dequantize: mxfp4, )?or dequantize it once with "
    r"transformers: .*from_pretrained"
    r"\(folder, dtype='bfloat16', quantization_config={}\(dequantize=True\)\).save_pretrained\(new_folder\)"
)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no lm_head": (untied, "the weights hold no tensor 'lm_head.weight', which LlamaForCausalLM needs"),
    "no final norm": (weights(lambda held: held.pop("model.norm.weight")), "no tensor 'model.norm.weight'"),
    "no norm in a layer": (
        weights(lambda held: held.pop("model.layers.2.input_layernorm.weight")),
        "no tensor 'model.layers.2.input_layernorm",
    ),
    "short norm": (
        weights(lambda held: held.update({FIRST + "post_attention_layernorm.weight": torch.ones(95)})),
        r"post_attention_layernorm.weight' is \(95,\) in the weights, \(96,\) by config.json",
    ),
    "short final norm": (
        weights(lambda held: held.update({"model.norm.weight": torch.ones(1)})),
        r"'model.norm.weight' is \(1,\)",
    ),
    "bias that is left out": (
        weights(lambda held: held.update({FIRST + "self_attn.q_proj.bias": torch.ones(96)})),
        "hold 'model.layers.0.self_attn.q_proj.bias', which LlamaForCausalLM with this config.json leaves out",
    ),
    "bias that is missing": (config(attention_bias=True), "no tensor 'model.layers.0.self_attn.q_proj.bias'"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers: 0 is not a whole number above 0"),
    "layers below nothing": (config(num_hidden_layers=-3), "num_hidden_layers: -3 is not"),
    "layers beyond the weights": (config(num_hidden_layers=10_000_000), "no tensor 'model.layers.3"),
    "absurd layers": (config(num_hidden_layers=10**18), "num_hidden_layers: 1000000000000000000 is not a whole number"),
    "hundreds of digits": (config(vocab_size=10**300), "vocab_size: a number of more than 40 digits"),
    "thousands of digits": (text("config.json", '{"vocab_size": ' + "1" * 5000 + "}"), "not a JSON file"),
    "layers as text": (config(num_hidden_layers="3"), "num_hidden_layers: '3' is not a whole number"),
    "size with a point": (config(hidden_size=96.0), "hidden_size: 96.0 is not a whole number"),
    "size as truth": (config(hidden_size=True), "hidden_size: True is not a whole number"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads: 0 is not"),
    "heads that do not go": (
        config(num_attention_heads=7, head_dim=None),
        "7 heads are not compatible with a hidden_size of 96 and 2 key-value heads",
    ),
    "no vocabulary": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({key: value for key, value in read_json(folder / "config.json").items() if key != "vocab_size"})
        ),
        "the key 'vocab_size' is missing",
    ),
    "tied as text": (config(tie_word_embeddings="false"), "tie_word_embeddings: 'false' is not a bool"),
    "epsilon as text": (config(rms_norm_eps="1e-5"), "rms_norm_eps: '1e-5' is not a int or float"),
    "epsilon no number": (config(rms_norm_eps=float("nan")), "config.json: NaN is not valid JSON"),
    "theta below nothing": (config(rope_theta=-1.0), "rope_theta: -1.0 is not a number from 0"),
    "rope a list": (config(rope_parameters=[1]), r"rope_parameters: \[1\] is not a dict"),
    "architectures a text": (config(architectures="LlamaForCausalLM"), "'architectures' has to be a list of names"),
    "model_type a list": (config(architectures=None, model_type=["llama"]), "'model_type' a name"),
    "quantized by a word": (config(quantization_config="awq"), r"already quantized \(awq"),
    "quantized to FP8": (config(quantization_config={"quant_method": "fp8"}), REMEDY.format("FineGrainedFP8Config")),
    "quantized to MXFP4": (config(quantization_config={"quant_method": "mxfp4"}), REMEDY.format("Mxfp4Config")),
    "quantized by a list": (
        config(quantization_config={"quant_method": ["fp8"]}),
        r"already quantized \(\['fp8'\], by",
    ),
    "FP8 weights": (
        weights(lambda held: held.update(in_fp8(held, FIRST + "mlp.up_proj.weight"))),
        r"'model.layers.0.mlp.up_proj.weight' is already quantized \(FP8\); " + REMEDY.format("FineGrainedFP8Config"),
    ),
    "MXFP4 weights": (
        weights(lambda held: held.update(in_mxfp4(held, FIRST + "mlp.up_proj.weight"))),
        r"'model.layers.0.mlp.up_proj.weight_blocks' is already quantized \(MXFP4\); " + REMEDY.format("Mxfp4Config"),
    ),
    "blocks without scales": (
        weights(lambda held: held.update({"model.norm.weight_blocks": torch.ones(4, dtype=torch.uint8)})),
        "hold 'model.norm.weight_blocks', which LlamaForCausalLM with this config.json leaves out",
    ),
    "further layer that config.json does not count": (
        weights(lambda held: held.update({"model.layers.3.input_layernorm.weight": torch.ones(96)})),
        "hold 'model.layers.3.input_layernorm.weight', which",
    ),
    "further layer beyond the count": (
        lambda folder: (
            weights(lambda held: held.update({"model.layers.4.input_layernorm.weight": torch.ones(96)}))(folder),
            edit_json(folder / "config.json", num_nextn_predict_layers=1),
        ),
        "hold 'model.layers.4.input_layernorm.weight', which",
    ),
    "layer that a number begins with": (
        lambda folder: (
            weights(lambda held: held.update({"model.layers.03x.weight": torch.ones(96)}))(folder),
            edit_json(folder / "config.json", num_nextn_predict_layers=9),
        ),
        "hold 'model.layers.03x.weight', which",
    ),
    "further layers as text": (config(num_nextn_predict_layers="1"), "num_nextn_predict_layers: '1' is not a int"),
    "mtp by another name": (
        weights(lambda held: held.update({"model.mtp.norm.weight": torch.ones(96)})),
        "hold 'model.mtp.norm.weight', which",
    ),
    "config a list": (text("config.json", "[]"), "config.json: holds a list, not a JSON object"),
    "config null": (text("config.json", "null"), "config.json: holds a NoneType, not a JSON object"),
    "config deep": (text("config.json", '{"a": ' + "[" * 200_000), "config.json: JSON is nested"),
    "config not UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xff"}'),
        "config.json: not a JSON file",
    ),
    "tokenizer a list": (text("tokenizer.json", "[1]"), "tokenizer.json: holds a list, not a JSON object"),
    "tokenizer's settings a text": (
        text("tokenizer_config.json", '"x"'),
        "tokenizer_config.json: holds a str, not a JSON object",
    ),
    "added tokens a list": (text("added_tokens.json", "[]"), "added_tokens.json: holds a list, not a JSON object"),
    "vocabulary without merges": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
        "holds vocab.json without merges.txt",
    ),
    "index a list": (text(folders.INDEX, "[]"), "index.json: holds a list, not a JSON object"),
    "index without map": (
        text(folders.INDEX, "{}"),
        "weight_map has to map every tensor to a file in this folder",
    ),
    "index of numbers": (sharded({"a": 1}), "weight_map has to map"),
    "index beyond the folder": (sharded({"a": "../../x.safetensors"}), "weight_map has to map"),
    "index without a tensor": (
        sharded({"model.norm.weight": "model.safetensors"}),
        "listed in no file but found in model.safetensors",
    ),
    "index of nothing": (sharded({"a": "x.safetensors"}), "x.safetensors is missing"),
    "endless header": (sparse, "not a complete safetensors file"),
    "header longer than file": (header(b"{}", 2**62), "not a complete safetensors file"),
    "header a list": (header(b"[]"), "not a complete safetensors file"),
    "header deep": (header(b"[" * 200_000), "not a complete safetensors file"),
    "header of numbers": (header(b'{"a": 1}'), "'a' has no consistent dtype, shape and data_offsets"),
    "header without offsets": (header(b'{"a": {"dtype": "F32", "shape": []}}'), "'a' has no consistent dtype"),
    "header of other sizes": (
        header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}'),
        "'a' has no consistent dtype",
    ),
    "shape of texts": (
        header(b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}'),
        "'a' has no consistent dtype",
    ),
    "negative shape": (
        header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'),
        "'a' has no consistent dtype",
    ),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
}


@pytest.mark.parametrize("name", BAD)
def test_folders_are_refused_in_a_line_soon_and_in_little_memory(tmp_path: Path, name: str):
    spoil, message = BAD[name]
    folder = tiny(tmp_path / "model")
    spoil(folder)
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=message) as refused:
        folders.shape_of({"source": "local", "path": str(folder)}, "models.mine")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    assert (
        time.process_time() - begin < SECONDS
        and (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEBIBYTES
    )


@pytest.mark.parametrize("value", [0, -1, 10**30, 2.0, True, "8", None])
def test_declared_shapes_are_sizes(value: Any):
    shape = {**plan_cases.SHAPE, "layers": value}
    with pytest.raises(
        ConfigError, match=r"models\.x\.shape\.layers: .* is not a whole number above 0 and up to 16777216"
    ):
        folders.shape_of({"source": "hub", "id": "a/b", "shape": shape}, "models.x")


def test_only_what_decides_the_function_is_taken_of_a_config(tmp_path: Path):
    from quantgrid.calibration.streaming import FullPrecision, streamed
    from quantgrid.evaluation.perplexity import final_hidden
    from quantgrid.models.skeletons import attention_of

    folder = tiny(tmp_path / "model")
    fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "plain")
    settings = {
        "attn_implementation": "eager",
        "_attn_implementation": "eager",
        "torch_dtype": "float64",
        "dtype": "float16",
        "auto_map": {"AutoModelForCausalLM": "evil.E"},
        "attention_dropout": 0.9,
        "output_hidden_states": True,
        "quantization_config": None,
        "use_cache": True,
        "use_kernels": True,
        "tp_plan": "auto",
        "pretraining_tp": 2,
        "unknown_setting": 1,
    }
    edit_json(folder / "config.json", **settings)
    fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "odd")
    assert read_json(tmp_path / "odd" / "config.json") == read_json(tmp_path / "plain" / "config.json")
    assert not settings.keys() & read_json(tmp_path / "odd" / "config.json").keys()
    model = streamed(FullPrecision(tmp_path / "odd"))
    assert attention_of(model) == "sdpa"
    windows = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        final_hidden(model, windows, 2), final_hidden(streamed(FullPrecision(tmp_path / "plain")), windows, 2)
    )


def test_what_a_decoder_does_not_read_is_ignored_by_name(tmp_path: Path):
    """Multi-token prediction and tables of rotary positions; other tensors are refused (``BAD``)."""
    folder = tiny(tmp_path / "model")
    spare = ("mtp.layers.0.q_proj.weight", "model.layers.3.eh_proj.weight", "model.layers.4.shared_head.norm.weight")
    tables = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    weights(lambda held: held.update({name: torch.ones(7) for name in (*spare, *tables)}))(folder)
    edit_json(folder / "config.json", num_nextn_predict_layers=2)
    entry = {"source": "local", "path": str(folder)}
    assert folders.shape_of(entry, "models.mine").layers == 3
    fetch.fetch(entry, tmp_path / "fetched")
    assert folders.check_folder(tmp_path / "fetched").layers == 3


def test_a_setting_that_decides_the_function_is_kept(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    edit_json(
        folder / "config.json",
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        rms_norm_eps=1e-6,
        hidden_act="gelu",
        rope_theta=5e5,
    )
    fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "out")
    kept = read_json(tmp_path / "out" / "config.json")
    assert (
        kept["rope_scaling"]["factor"] == 2.0
        and kept["rms_norm_eps"] == 1e-6
        and kept["hidden_act"] == "gelu"
        and kept["rope_theta"] == 5e5
    )
