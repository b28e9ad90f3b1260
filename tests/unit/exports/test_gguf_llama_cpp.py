"""llama.cpp on GGUF files: its probabilities and token ids are those of the cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export_cases import Source, cell
from family_models import some_tokens
from gguf_cases import FORMATS, NVFP4, Q4_0, Q8_0, letters, trained
from quantgrid.calibration.streaming import streamed
from quantgrid.evaluation.perplexity import final_states
from quantgrid.exports.export import export
from quantgrid.exports.gguf import write_gguf
from quantgrid.exports.gguf_check import ENVIRONMENT, KL, TEXTS, probe_python, run_probe
from quantgrid.exports.packed_cell import PackedCell
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT
from quantgrid.models.lm_head import head_of

needs_llama_cpp = pytest.mark.skipif(
    not (ROOT / ENVIRONMENT / "bin" / "python").is_file(), reason=f"make {ENVIRONMENT}/.installed"
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Source:
    return trained(tmp_path_factory.mktemp("reference"), ROOT / "models" / "reference-1m")


@needs_llama_cpp
@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FORMATS, "NVFP4"])
def test_an_export_computes_what_the_cell_does(name: str, reference: Source, tmp_path: Path):
    folder = cell(reference, tmp_path / "cell", {**FORMATS, "NVFP4": NVFP4}[name], "group-32")
    about = {"model": "Tiny", "license": "mit", "entry": {"source": "hub", "id": "someone/Tiny", "revision": "abc"}}
    report = export(reference.model, folder, None, reference.windows, "gguf", tmp_path / "out", about=about)
    found = report["check"]
    assert found["llama_cpp_kl"] < KL and found["tokens_equal"] and found["accepted"]
    assert found["llama_cpp_positions"] == 64 and found["kl"] < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"Tiny-{name}.gguf", "README.md", "export.json", "quantgrid.yaml"
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card and "base_model: someone/Tiny" in card
    assert "KL divergence of llama.cpp from the cell" in card and "import xllamacpp" in card
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] == found


@needs_llama_cpp
@pytest.mark.nightly
def test_outliers_of_activations_cost_what_8_bits_cost(tmp_path: Path):
    """The tiny Llama has planted outliers: llama.cpp diverges far more, and so does the same rounding
    in transformers."""
    source = trained(tmp_path)
    folder = cell(source, tmp_path / "cell", Q4_0, "group-32")
    found = export(source.model, folder, None, source.windows, "gguf", tmp_path / "out")["check"]
    assert found["max_logit_difference"] == 0
    assert 10 * KL < found["llama_cpp_kl"] < 2 * found["rounding_kl"]


@needs_llama_cpp
@pytest.mark.nightly
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_every_architecture_with_biases_and_scaled_positions(architecture: str, rope: str, tmp_path: Path):
    """kv heads != heads. A wrong order of rows or a forgotten bias costs nats."""
    if rope == "llama3" and architecture.startswith("Qwen"):
        pytest.skip("llama3 positions belong to Llama")
    scaling = {"rope_type": rope, "rope_theta": 10000.0}
    scaling |= {"factor": 4.0} if rope != "default" else {}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    source = Source.tiny(architecture, tmp_path, rope_parameters=scaling)
    packed = PackedCell(cell(source, tmp_path / "cell", Q8_0, "group-32"))
    write_gguf(tmp_path / "x.gguf", packed, letters(packed.shape.vocabulary), {"name": "x"})
    tokens, lengths = some_tokens(2, 24), [list(range(1, 25))] * 2
    found, _ = run_probe(tmp_path / "x.gguf", tokens.tolist(), lengths, packed.shape.vocabulary, probe_python())
    model = streamed(packed.without_rounded_cache())
    with torch.no_grad():
        logs = head_of(model)(final_states(model, tokens, 1)).log_softmax(-1).flatten(0, 1)
    assert (logs.exp() * (logs - found)).sum(-1).mean() < 0.01


@needs_llama_cpp
@pytest.mark.nightly
def test_a_file_that_llama_cpp_does_not_load_is_refused_with_its_words(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ConfigError, match="llama.cpp does not run it"):
        run_probe(tmp_path / "x.gguf", [[1]], [[1]], 10, probe_python())


def test_a_missing_environment_is_named_with_its_target(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("QUANTGRID_XLLAMACPP_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=f"make {ENVIRONMENT}/.installed"):
        probe_python()


def test_texts_hold_what_pre_tokenizers_split_differently():
    joined = "".join(TEXTS)
    assert all(
        part in joined for part in ("\r\n", "\n\n", "  ", "\t", "1234567890", "'ll", "I'D", "🙂", "数", "हि", "½")
    )
