"""Between-workflow caching: a second checkout takes model, corpora, calibration and transforms from
the first one's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkouts import Checkout
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import verify, write_record
from quantgrid.jobs.shared_cache import detach

RESULTS = "results-smoke"
CACHED = (
    "models/*/*/[a-z]*.*",
    "corpora/**/*.safetensors",
    "calibration/**/*.safetensors",
    "transforms/**/*.safetensors",
    "transforms/**/*.csv",
)


def linked(folder: Path, cache: Path) -> Path:
    """A model folder and its record such as a second checkout is given: a link for each file, into
    entries of ``cache``."""
    own, digest = folder / "models" / "m" / "0123456789", folder / "digests" / "fetch_model" / "m" / "0123456789.json"
    own.mkdir(parents=True)
    (own / "weights").write_bytes(b"1234")
    (own / "config.json").write_text("{}")
    write_record("fetch_model", [own])
    cache.mkdir()
    for place, entry in (
        (own / "weights", "f00_folder/weights"),
        (own / "config.json", "f00_folder/config.json"),
        (digest, "f00_digest.json"),
    ):
        (cache / entry).parent.mkdir(exist_ok=True)
        place.rename(cache / entry)
        place.symlink_to(cache / entry)
    (cache / "f01_windows.safetensors").touch()
    return own


def test_every_file_of_a_cached_folder_is_verified_and_its_entry_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    folder = linked(tmp_path / "results", cache)
    verify(folder)
    (cache / "f00_folder" / "weights").write_bytes(b"1243")
    record = tmp_path / "results" / "digests" / "fetch_model" / "m" / "0123456789.json"
    changed = "weights: its content has changed: not what fetch_model wrote"
    with pytest.raises(ConfigError, match=f"{changed}; delete {folder} and {record} and run again"):
        verify(folder)
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(cache))
    with pytest.raises(
        ConfigError,
        match=f"delete {folder} and {record} and {cache}/f00_digest.json and {cache}/f00_folder and run again",
    ):
        verify(folder)
    shutil.rmtree(cache / "f00_folder")
    with pytest.raises(ConfigError, match="config.json: is gone: not what fetch_model wrote"):
        verify(folder)


def test_links_are_replaced_by_copies_before_an_entry_is_stored(tmp_path: Path):
    source, made = tmp_path / "weights", tmp_path / "made"
    source.write_bytes(b"1234")
    source.chmod(0o640)
    made.mkdir()
    (made / "model.safetensors").symlink_to(source)
    detach(["no such file", made])
    [found] = made.iterdir()
    assert not found.is_symlink() and found.read_bytes() == b"1234"
    found.chmod(0o666)
    assert source.stat().st_mode & 0o777 == 0o640


def prepared(folder: Path, **alpha: float) -> tuple[Checkout, str]:
    """A checkout in which everything up to the transforms was run, and what the run said."""
    checkout = Checkout.make(folder)
    config = checkout.config()
    config["transforms"] = {
        "none": {"method": "none"},
        "smoothquant": {"method": "scaling", **alpha},
        "learned": {"method": "flatquant", "steps": 1},
    }
    study = {"transforms": ["none", "smoothquant", "learned"], "mitigations": ["rtn"], "also": []}
    config["studies"] = {"methods": {**config["studies"]["methods"], **study}}
    config["report"] = {}
    checkout.write_config(config, "smoke")
    return checkout, checkout.run("smoke", "--until", "fit_transform")


def damaged_is_noticed(checkout: Checkout, cache: Path) -> None:
    """One bit of the cached statistics flips: what reads them fails and says so; deleted, they are
    made again."""
    [link] = (checkout.folder / RESULTS).glob("calibration/**/statistics.safetensors")
    entry = link.resolve()
    content = entry.read_bytes()
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    output = checkout.run("smoke", "--until", "quantize_model", ok=False)
    said = f"calibrate_model wrote; delete {link.relative_to(checkout.folder)} and "
    assert said in output and f"and {entry} and run again" in output, output[-4000:]
    errors = "evaluations/*/*/rtn/*/*/error/*.json"
    assert not checkout.contents(RESULTS, errors), "no cell was computed from it"
    entry.unlink()
    checkout.run("smoke", "--until", "quantize_model")
    assert (
        entry.read_bytes() == content and entry.is_relative_to(cache) and len(checkout.contents(RESULTS, errors)) == 3
    )


@pytest.mark.slow
@pytest.mark.workflow
def test_a_second_checkout_takes_from_the_cache_and_another_option_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(cache))
    first, _ = prepared(tmp_path / "first", alpha=0.5)
    made = first.contents(RESULTS, *CACHED)
    assert {name.split("/")[-1] for name in made} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "provenance.json",
    }
    assert len([name for name in made if not name.startswith("models/")]) == 1 + 1 + 2 * 3
    assert all((first.folder / RESULTS / name).resolve().is_relative_to(cache) for name in made)
    assert not any(path.is_symlink() for path in cache.rglob("*")), "an entry stands by itself"
    stored = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second, _ = prepared(tmp_path / "second", alpha=0.5)
    assert second.contents(RESULTS, *CACHED) == made
    assert {path.name: path.stat().st_mtime_ns for path in cache.rglob("*")} == stored
    logs = [
        log
        for rule in ("fetch_model", "calibrate_model")
        for log in (second.folder / RESULTS / "logs").glob(f"{rule}/**/*.log")
    ]
    assert not any(log.stat().st_size for log in logs), "nothing was fetched, nothing calibrated"
    assert all(
        "fetch_model" not in dict(checkout.planned("smoke", "--until", "fit_transform")) for checkout in (first, second)
    )
    damaged_is_noticed(second, cache)
    before = set(cache.iterdir())
    third, _ = prepared(tmp_path / "third", alpha=0.7)
    fresh = set(cache.iterdir()) - before
    assert len(fresh) == 3, "one transform: its parameters, its losses, their record"
    assert third.contents(RESULTS, "calibration/**/*.safetensors") == first.contents(
        RESULTS, "calibration/**/*.safetensors"
    )
