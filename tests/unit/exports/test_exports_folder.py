"""Exported folders: files, shards, refusals before anything is written, and folders that failed."""

from __future__ import annotations

import weakref
from collections import namedtuple

import pytest
import torch
import yaml

from export_cases import BF16, cell
from quantgrid.exports import compressed_tensors, folder, rotations
from quantgrid.exports.dense import Dense
from quantgrid.exports.export import export
from quantgrid.exports.folder import bytes_needed, write_folder
from quantgrid.exports.packed_cell import PackedCell
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json, read_tensors, sha256_of

WEIGHTS = {"preset": "w4a16", "weight": BF16}
ABOUT = {
    "cell": "none-rtn-w4a16",
    "model": "tiny",
    "entry": {"source": "hub", "id": "owner/tiny", "revision": "main"},
    "license": "other",
    "license_name": "tiny-terms",
    "license_link": "LICENSE",
    "language": ["en"],
    "config": {"studies": {"a": {"models": ["tiny"]}}},
    "results": [
        {
            "metric": "perplexity",
            "corpus": "docs",
            "value": 12.5,
            "stderr": 0.1,
            "full_precision": 12.0,
            "protocol": "p",
        }
    ],
}


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """A source with tokenizer files and a licence, and a cell of it."""
    source = sources()
    (source.model / "tokenizer.json").write_text("{}")
    (source.model / "chat_template.jinja").write_text("{{ messages }}")
    (source.model / "LICENSE").write_text("terms\n")
    return source, cell(source, tmp_path_factory.mktemp("cell"), WEIGHTS, "group-32")


def run(made, out, target="dense", **further):
    source, checkpoint = made
    return export(source.model, checkpoint, None, source.windows, target, out, about=ABOUT, **further)


def test_the_folder_has_what_people_expect(made, tmp_path):
    report = run(made, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "README.md", "LICENSE", "chat_template.jinja", "config.json", "export.json", "generation_config.json",
        "model.safetensors", "quantgrid.yaml", "tokenizer.json",
    }  # fmt: skip
    assert report == read_json(tmp_path / "out" / "export.json")
    assert report["sha256"]["model.safetensors"] == sha256_of(tmp_path / "out" / "model.safetensors")
    record = yaml.safe_load((tmp_path / "out" / "quantgrid.yaml").read_text())
    assert record["cell"] == ABOUT["cell"] and record["config"] == ABOUT["config"]
    assert record["checkpoint_sha256"] == read_json(made[1] / "quantgrid.json")["sha256"]
    assert str(tmp_path) not in (tmp_path / "out" / "quantgrid.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_has_the_head_that_the_hub_reads(made, tmp_path):
    run(made, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "owner/tiny" and head["base_model_relation"] == "quantized"
    assert {key: head[key] for key in ABOUT if key.startswith("licen")} == {
        "license": "other",
        "license_name": "tiny-terms",
        "license_link": "LICENSE",
    }
    assert head["language"] == ["en"] and head["pipeline_tag"] == "text-generation"
    assert {"quantgrid", "w4a16"} <= set(head["tags"])
    assert "| perplexity | docs | 12.5 ± 0.1 | 12 | p |" in card
    assert "largest difference of a logit from the cell: 0 " in card
    assert "not rounded: embedding, lm_head, norms" in card and "4.500 bits per weight" in card


def test_a_model_that_is_not_on_the_hub_has_no_base(made, tmp_path):
    source, checkpoint = made
    export(source.model, checkpoint, None, source.windows, "dense", tmp_path / "out")
    assert "base_model" not in yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])


def test_shards_have_an_index_and_the_same_tensors(made, tmp_path):
    source, checkpoint = made
    cells = PackedCell(checkpoint)
    for name, limit in (("one", 10**9), ("many", 40_000)):
        (tmp_path / name).mkdir()
        write_folder(cells, Dense(cells.features(), torch.bfloat16), source.model, tmp_path / name, name, limit)
    whole = read_tensors(tmp_path / "one" / "model.safetensors")
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    found = {}
    for file in files:
        part = read_tensors(tmp_path / "many" / file)
        assert {index["weight_map"][name] for name in part} == {file}
        found |= part
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())


def test_an_existing_folder_is_refused(made, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"OUT: .*out exists already"):
        run(made, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_small_disk_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(ConfigError, match=r"OUT: .* needs 0\.00 GB, and 0\.00 GB are free"):
        run(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["dense", "compressed-tensors", "gptq"])
def test_the_estimate_of_bytes_covers_the_tensors(made, target):
    features = PackedCell(made[1]).features()
    linears = features.shape.layers * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    least = linears * (2 if target == "dense" else 4.25 / 8)
    assert least < bytes_needed(features, target) < 12 * least


def test_one_layer_is_in_memory_at_a_time(made, tmp_path, monkeypatch):
    reads, alive = PackedCell.layer, []

    def counted(self, index):
        assert not [layer for layer in alive if layer() is not None]
        layer = reads(self, index)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(PackedCell, "layer", counted)
    run(made, tmp_path / "out")
    assert len(alive) == 2


def test_an_interrupted_export_leaves_nothing(made, tmp_path, monkeypatch):
    reads = PackedCell.layer

    def interrupted(self, index):
        if index == 1:
            raise KeyboardInterrupt
        return reads(self, index)

    monkeypatch.setattr(PackedCell, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_computes_something_else_is_rejected(made, tmp_path, monkeypatch):
    packs = compressed_tensors.weight_tensors

    def wrong(*args):
        parts = packs(*args)
        return {**parts, "weight_scale": parts["weight_scale"] * 1.5}

    monkeypatch.setattr(compressed_tensors, "weight_tensors", wrong)
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "earlier").touch()
    with pytest.raises(ConfigError, match=r"other logits than the cell.*accepted: equal logits.*out\.rejected"):
        run(made, tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert not (tmp_path / "out.rejected" / "earlier").exists(), "a rejection replaces the one before"
    report = read_json(tmp_path / "out.rejected" / "export.json")
    assert report["check"]["accepted"] is False and report["check"]["kl"] > 0


def test_a_refused_cell_writes_nothing(made, tmp_path):
    source, _ = made
    checkpoint = cell(source, tmp_path / "cell", {"preset": "nf4"})
    with pytest.raises(ConfigError, match="compressed-tensors cannot hold the cell: no format holds nf4 weights"):
        run((source, checkpoint), tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


def test_a_missing_environment_is_named_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTGRID_GPTQMODEL_PYTHON", str(tmp_path / "none" / "python"))
    with pytest.raises(ConfigError, match=r"make \.venv-gptqmodel/\.installed"):
        run(made, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


def test_the_loader_file_of_rotations_is_short():
    assert len(rotations.LOADER.splitlines()) < 50
