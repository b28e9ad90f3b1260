"""GGUF files: read back by transformers' own reader and by the gguf package, they are the cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from export_cases import Source, cell, logits
from family_models import some_tokens
from gguf_cases import FORMATS, NVFP4, Q4_0, Q8_0, letters, trained
from quantgrid.calibration.streaming import streamed
from quantgrid.evaluation.perplexity import final_states
from quantgrid.exports.gguf import file_name, write_gguf
from quantgrid.exports.gguf_check import compare_weights, spread
from quantgrid.exports.gguf_metadata import model_of
from quantgrid.exports.gguf_names import halved, interleaved
from quantgrid.exports.gguf_source import GGUFSource, rounded_to_bytes
from quantgrid.exports.gguf_tokenizer import read_tokenizer
from quantgrid.exports.packed_cell import PackedCell
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_tensors
from quantgrid.models.lm_head import head_of
from quantgrid.quantization.checkpoints import load_quantized

GENERAL = {
    "name": "Tiny",
    "license": "apache-2.0",
    "base_model.0.name": "Tiny",
    "base_model.0.organization": "someone",
    "base_model.0.repo_url": "https://huggingface.co/someone/Tiny",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Source:
    return trained(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def written(llama: Source, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Name of a format -> (folder of its cell, file)."""
    found = {}
    for name, entry in FORMATS.items():
        folder = cell(llama, tmp_path_factory.mktemp(name), entry, "group-32")
        packed = PackedCell(folder)
        path = folder / file_name("Tiny", packed)
        write_gguf(path, packed, read_tokenizer(llama.model, packed.shape.vocabulary), GENERAL)
        found[name] = folder, path
    return found


def value(reader: GGUFReader, key: str):
    return reader.fields[key].contents()


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_reads_the_cell_from_the_file(name: str, written, llama: Source):
    """An independent reader, with its own order of rows: equal logits, up to the minima of Q4_1."""
    from transformers import AutoModelForCausalLM

    folder, path = written[name]
    assert path.name == f"Tiny-{name}.gguf"
    tokens = read_tensors(llama.windows)["windows"][:1].long()
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    difference = (logits(read, tokens) - logits(load_quantized(folder), tokens)).abs().max()
    assert difference == 0 if name != "Q4_1" else 0 < difference < 0.05


def test_transformers_reads_the_tokenizer_from_the_file(written, llama: Source):
    from transformers import AutoTokenizer

    _, path = written["Q4_0"]
    text = "def f(x):\n\treturn  'it\\'s 123', naïve — 数"
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert read(text)["input_ids"] == AutoTokenizer.from_pretrained(llama.model)(text)["input_ids"]


def test_keys_of_the_model_its_tokenizer_and_its_origin(written):
    reader = GGUFReader(written["MXFP4"][1])
    wanted = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "general.quantized_by": "quantgrid",
        "general.file_type": 38,
        "general.quantization_version": 2,
        "general.base_model.count": 1,
        "general.base_model.0.organization": "someone",
        "llama.block_count": 3,
        "llama.context_length": 512,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: value(reader, key) for key in wanted} == wanted


def test_tensors_have_the_types_of_their_kind(written):
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written["Q4_0"][1]).tensors}
    assert types["token_embd.weight"] == "BF16" and "output.weight" not in types
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert {types[f"blk.2.{part}.weight"] for part in ("attn_q", "attn_output", "ffn_down")} == {"Q4_0"}


def test_rows_of_a_head_are_interleaved_within_the_heads_of_keys():
    """Definition, row by row: element i of the first half of a head comes to row 2 i, of the second
    half to row 2 i + 1."""
    heads, size = 3, 8
    rows = np.arange(heads * size * 2).reshape(heads * size, 2)
    wanted = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            wanted[head * size + 2 * i] = rows[head * size + i]
            wanted[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    assert np.array_equal(interleaved(rows, heads), wanted)
    assert np.array_equal(halved(wanted, heads), rows)


ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_its_biases(architecture: str, tmp_path: Path):
    """Llama's case has biases everywhere and kv heads != heads; a second reader is in the first test."""
    source = Source.tiny(architecture, tmp_path, **ARCHITECTURES[architecture])
    packed = PackedCell(cell(source, tmp_path / "cell", Q8_0, "group-32"))
    path = tmp_path / "model.gguf"
    write_gguf(path, packed, letters(61), {"name": "x"})
    tokens = some_tokens(2, 24)
    model = streamed(packed.without_rounded_cache())
    found = compare_weights(path, packed, tokens, final_states(model, tokens, 1), head_of(model))
    assert found["max_logit_difference"] == found["kl"] == 0
    assert found["perplexity"] == found["cell_perplexity"]
    has_biases = any(tensor.name.endswith("attn_q.bias") for tensor in GGUFReader(path).tensors)
    assert has_biases == (architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM"))


def test_some_linears_in_nvfp4_and_the_others_in_bfloat16(llama: Source, tmp_path: Path):
    packed = PackedCell(cell(llama, tmp_path / "cell", {**NVFP4, "linears": ["down"]}))
    path = tmp_path / "model.gguf"
    write_gguf(path, packed, letters(packed.shape.vocabulary), {"name": "x"})
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types["blk.1.ffn_down.weight"] == "NVFP4" and types["blk.1.ffn_down.scale"] == "F32"
    assert types["blk.1.attn_q.weight"] == "BF16"
    tokens = read_tensors(llama.windows)["windows"][:1].long()
    model = streamed(packed.without_rounded_cache())
    found = compare_weights(path, packed, tokens, final_states(model, tokens, 1), head_of(model))
    assert found["kl"] < 1e-6 and found["max_logit_difference"] < 1e-3


def test_inputs_rounded_to_bytes_are_within_half_a_step():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[0, :32] = 0
    steps = (x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127).repeat_interleave(32, -1)
    assert ((rounded_to_bytes(x) - x).abs() <= 0.5 * steps + x.abs() * 2**-11).all()
    assert (rounded_to_bytes(x) != x).any()


def test_rounded_inputs_change_quantized_linears_alone(written, llama: Source, tmp_path: Path):
    tokens = read_tensors(llama.windows)["windows"][:1].long()
    plain = PackedCell(cell(llama, tmp_path / "cell", {"preset": "bf16"}))
    unrounded = tmp_path / "plain.gguf"
    write_gguf(unrounded, plain, letters(plain.shape.vocabulary), {"name": "x"})
    for path, config, is_equal in (
        (unrounded, plain.config, True),
        (written["Q4_0"][1], PackedCell(written["Q4_0"][0]).config, False),
    ):
        with torch.no_grad():
            states = [final_states(streamed(GGUFSource(path, config, rounded)), tokens, 1) for rounded in (False, True)]
        assert torch.equal(*states) == is_equal


def test_positions_are_spread_over_windows():
    assert spread(4, 128) == [[8 * number for number in range(1, 17)]] * 4
    assert sum(map(len, spread(1, 2048))) == 64 and spread(1, 2048)[0][-1] == 2048
    assert spread(2, 3) == [[1, 2, 3]] * 2


def with_config(packed: PackedCell, **changes) -> PackedCell:
    packed.about["config"] = {**packed.about["config"], **changes}
    return packed


def test_rope_scaling_of_llama_3_is_that_of_transformers(written):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = model_of(with_config(PackedCell(written["Q4_0"][0]), rope_parameters=rope)).frequency_factors
    assert factors.shape == (8,) and factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)
    assert (np.diff(factors) >= -1e-6).all()


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
    ids=["yarn", "gelu"],
)
def test_settings_that_llama_cpp_computes_differently_are_refused(changes: dict, part: str, written):
    with pytest.raises(ConfigError, match=part):
        model_of(with_config(PackedCell(written["Q4_0"][0]), **changes))


def test_the_context_ends_where_a_sliding_window_begins_to_matter(tmp_path: Path):
    source = Source.tiny("MistralForCausalLM", tmp_path, sliding_window=32)
    assert model_of(PackedCell(cell(source, tmp_path / "cell", Q4_0, "group-32"))).context == 32


def test_a_file_that_cannot_be_written_leaves_nothing(llama: Source, tmp_path: Path):
    packed = PackedCell(cell(llama, tmp_path / "cell", Q4_0, "group-16"))
    with pytest.raises(ConfigError, match="multiples of 32"):
        write_gguf(tmp_path / "out" / "x.gguf", packed, letters(packed.shape.vocabulary), {"name": "x"})
    assert not list((tmp_path / "out").glob("*"))
