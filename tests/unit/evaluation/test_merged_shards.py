"""Merged shards have the bytes of one evaluation; a failed shard fails it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from in_process import Done, run_script
from quantgrid.corpora import token_windows
from quantgrid.evaluation.perplexity import evaluate, final_hidden
from quantgrid.evaluation.shards import joined, merged
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.places import ROOT
from quantgrid.ground.provenance import canonical
from quantgrid.ground.storage import read_json, write_json
from quantgrid.models.lm_head import head_of
from quantgrid.quantization.checkpoints import load_full_precision

TINY = ROOT / "tests" / "data" / "tiny-llama"
BATCH, WINDOWS = 4, 14
INFO = {"corpus": "docs", "window": 32, "stride": 32, "tokens": 600, "windows": 18, "text_sha256": "ab", "join": "\n"}


@pytest.fixture(scope="module")
def losses():
    """Losses of a disturbed model on windows from ``start`` up to ``stop``."""
    full, other = load_full_precision(TINY), load_full_precision(TINY)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    windows = torch.randint(512, (WINDOWS, 32), generator=torch.Generator().manual_seed(0))

    def of(start: int, stop: int) -> dict[str, list[float]]:
        part = windows[start:stop]
        return evaluate(other, part, final_hidden(full, part, BATCH), lambda: head_of(full), BATCH, first=start)

    return of


def shard(losses: dict[str, list[float]], number: int = 0, **changes) -> dict:
    return {
        "status": "ok",
        "axes": {"shard": str(number)},
        "versions": {"torch": "2"},
        "compute": {"device": "cpu"},
        "inputs": {"checkpoint": "a" * 64, "windows": "b" * 64, "reference": f"{number}" * 64},
        "model": {"weights_sha256": {}},
        "corpus": INFO,
        "dtype": "float32",
        "attention": "eager",
        "windows": losses,
        **changes,
    }


@pytest.mark.parametrize("ends", [(4, 14), (8, 12, 14), (4, 8, 12, 14)])
def test_shards_of_whole_batches_have_the_bytes_of_one_evaluation(losses, ends):
    parts = [shard(losses(start, stop), start) for start, stop in zip((0, *ends), ends)]
    whole = merged([shard(losses(0, WINDOWS))], WINDOWS)
    assert canonical(merged(parts, WINDOWS)) == canonical(whole)
    assert (
        len(whole["windows"]["kl_divergence"]) == WINDOWS == whole["protocol"]["windows"] == whole["corpus"]["windows"]
    )
    mean = math.fsum(whole["windows"]["negative_log_likelihood"]) / WINDOWS
    assert whole["perplexity"] == pytest.approx(math.exp(mean)) and "reference" not in whole["inputs"]


def test_shards_are_joined_in_their_order():
    parts = [
        {"windows": {name: [start, start + 1.0] for name in ("negative_log_likelihood", "kl_divergence")}}
        for start in (4.0, 0.0)
    ]
    assert joined(parts)["kl_divergence"] == [4.0, 5.0, 0.0, 1.0]


def test_a_failed_shard_fails_the_evaluation_with_the_first_reason():
    good = {"negative_log_likelihood": [1.0], "kl_divergence": [0.1]}
    failed = [{**shard(good), "status": "failed", "reason": f"window {number}"} for number in (3, 5)]
    found = merged([shard(good), *failed], 3)
    assert (found["status"], found["reason"]) == ("failed", "window 3") and "windows" not in found
    assert found["protocol"]["windows"] == 3


def test_all_windows_of_a_corpus_are_counted_by_the_corpus():
    good = {"negative_log_likelihood": [1.0] * 18, "kl_divergence": [0.1] * 18}
    assert merged([shard(good)], None)["protocol"]["windows"] == 18


def test_a_failure_names_the_window_of_the_corpus():
    model = load_full_precision(TINY)
    windows = torch.randint(512, (2, 16))
    reference = final_hidden(model, windows, 2)
    reference[1, 3, 3] = math.nan
    with pytest.raises(NumericalFailure, match="the loss of window 9 is NaN"):
        evaluate(model, windows, reference, lambda: head_of(model), 2, first=8)


def test_a_part_of_the_windows_is_read_and_too_many_are_refused(tmp_path):
    windows = torch.randint(512, (6, 32))
    token_windows.save(tmp_path / "w.safetensors", windows, {**INFO, "windows": 6, "tokens": 200})
    assert torch.equal(token_windows.load(tmp_path / "w.safetensors", 2, 5)[0], windows[2:5])
    assert torch.equal(token_windows.load(tmp_path / "w.safetensors")[0], windows)
    with pytest.raises(ConfigError, match=r"corpora\.docs: its 200 tokens make 6 windows of 32, but 8 are requested"):
        token_windows.load(tmp_path / "w.safetensors", 4, 8)


def merge(folder: Path, *paths: str) -> Done:
    spec = {"windows": 2, "axes": {"key": "0123456789"}}
    words = ["--spec", canonical(spec), "--shards", *paths, "--result", folder / "result.json"]
    return run_script("merge_shards", *words)


def test_the_job_writes_the_axes_of_its_step(tmp_path):
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    for number, path in enumerate(paths):
        write_json(path, shard({name: [1.0 + number] for name in ("negative_log_likelihood", "kl_divergence")}))
    assert merge(tmp_path, *paths).returncode == 0
    found = read_json(tmp_path / "result.json")
    assert found["axes"] == {"key": "0123456789"} and found["windows"]["kl_divergence"] == [1.0, 2.0]
    assert json.loads(canonical(found["protocol"]))["windows"] == 2
