"""Licences and cards of models: fetched with the model, and named on the cards of its exports."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

import export_model
from checkouts import ROOT
from quantgrid.ground.storage import read_json
from quantgrid.models import fetch
from quantgrid.models.model_cards import card_metadata, license_files

TINY = ROOT / "tests" / "data" / "tiny-llama"
LICENSED = {"LICENSE", "LICENSE-MODEL.txt", "NOTICE", "README.md", "USE_POLICY.md"}


@pytest.fixture
def licensed(tmp_path):
    """A model folder with licences, a card, and files that no fetch takes."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    for name in LICENSED:
        (folder / name).write_text(f"text of {name}\n")
    (folder / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en, de]\n---\n# Model\n")
    (folder / "code.py").write_text("1 / 0")
    (folder / "NOTICES").mkdir()
    return folder


def test_licences_and_card_of_a_local_model_are_copied(licensed, tmp_path):
    fetch.fetch({"source": "local", "path": str(licensed)}, tmp_path / "out")
    for name in LICENSED:
        assert (tmp_path / "out" / name).read_bytes() == (licensed / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    assert not (tmp_path / "out" / "code.py").exists() and not (tmp_path / "out" / "NOTICES").exists()
    assert {path.name for path in license_files(tmp_path / "out")} == LICENSED - {"README.md"}


def test_licences_and_card_of_a_hub_model_are_downloaded(licensed, tmp_path, monkeypatch):
    """The hub's own filter of names, on the files of the model and further ones of its repository."""
    further = ["pytorch_model.bin", "original/LICENSE", "consolidated.00.pth", "code.py"]

    def snapshot(name, revision, allow_patterns, ignore_patterns):
        there = [path.name for path in licensed.iterdir() if path.is_file()] + further
        found = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        folder = tmp_path / "0123abcd"
        folder.mkdir()
        for file in found:
            shutil.copyfile(licensed / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetch.fetch({"source": "hub", "id": "owner/model", "revision": "0123abcd"}, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= LICENSED
    assert not (tmp_path / "0123abcd" / "code.py").exists()
    assert read_json(tmp_path / "out" / "provenance.json")["commit"] == "0123abcd"


def test_the_card_of_an_export_names_license_and_language(licensed):
    about = export_model.known({"corpus": "docs"}, str(licensed))
    assert about == {"corpus": "docs", "license": "llama3.2", "language": ["en", "de"], "results": []}
    (licensed / "README.md").unlink()
    assert export_model.known({"corpus": "docs"}, str(licensed)) == {"corpus": "docs", "results": []}


OTHER = {"license": "other", "license_name": "gemma", "license_link": "https://example.org/terms"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"---\n{yaml.safe_dump(OTHER)}tags: [a]\n---\ntext", OTHER),
        ("\ufeff---\r\nlicense: mit\r\nlanguage: en\r\n---\r\ntext", {"license": "mit", "language": ["en"]}),
        ("---\nlanguage: [no, en]\nlicense:\n---\n", {"language": ["no", "en"]}),
        ("# no head\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("", {}),
    ],
)
def test_the_head_of_a_card(text, found, tmp_path, capsys):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card_metadata(tmp_path) == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: [\n---\n", "README.md: not a readable YAML file"),
        ("---\nlicense: {a: b}\n---\n", "README.md: license: {'a': 'b'} is not a text; it is not on the card"),
        ("---\nlanguage: [1]\n---\n", "README.md: language: [1] is not a text"),
    ],
)
def test_what_cannot_be_read_is_left_out_with_a_line(text, message, tmp_path, capsys):
    (tmp_path / "README.md").write_text(text)
    assert card_metadata(tmp_path) == {}
    assert message in capsys.readouterr().err
