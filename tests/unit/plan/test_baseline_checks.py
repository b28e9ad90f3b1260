"""Baseline checks: calibration text that is evaluated on and a wrong full-precision perplexity are
refused, and nothing is quantized."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkouts import Checkout
from in_process import Done, run_script
from quantgrid.config import check
from quantgrid.corpora import token_windows
from quantgrid.evaluation.baseline_check import check_published
from quantgrid.evaluation.protocols import of_perplexity
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.provenance import canonical
from quantgrid.ground.storage import read_json, write_json
from quantgrid.plan.baseline_checks import BaselineChecks
from quantgrid.plan.pipeline import Plan

CORPUS = {
    "corpus": "docs",
    "window": 64,
    "stride": 64,
    "windows": 8,
    "text_sha256": "ab",
    "join": "\n\n",
    "selection": "sequential",
}


def measured(value: float, **changes: Any) -> dict[str, Any]:
    return {"status": "ok", "perplexity": value, "protocol": of_perplexity(CORPUS, "float32"), **changes}


def test_within_one_percent_passes():
    assert check_published("m", "docs", 9.76, measured(9.7548)) == {
        "published": 9.76,
        "measured": 9.7548,
        "gap": 9.7548 / 9.76 - 1,
    }
    assert check_published("m", "docs", 10.0, measured(9.901))["gap"] == pytest.approx(-0.0099)


@pytest.mark.parametrize("value", [13.16, 9.76 * 1.0101, 9.76 * 0.9899, float("nan")])
def test_a_mismatch_names_the_likely_causes_and_the_protocol(value):
    with pytest.raises(ConfigError) as caught:
        check_published("llama", "docs", 9.76, measured(value))
    text = str(caught.value)
    assert text.startswith("models.llama.published.docs: full precision measures") and "published is 9.76" in text
    assert all(
        cause in text
        for cause in (
            "Instruct",
            "window",
            "BOS",
            "per word",
            "'llama' is not quantized",
            "window 64",
            "dtype float32",
        )
    )


def test_a_baseline_that_failed_cannot_pass():
    with pytest.raises(ConfigError, match="the full-precision evaluation failed: NaN in layer 2"):
        check_published("m", "docs", 9.76, {"status": "failed", "reason": "NaN in layer 2"})


# -- what waits for what ---------------------------------------------------------------------------


def config(**published: float) -> dict[str, Any]:
    shape = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "intermediate_size": 64,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "vocabulary": 8,
    }
    parts = (("text", "calibration"), ("unused", "calibration"), ("docs", "evaluation"))
    study = {"transforms": ["none"], "mitigations": ["rtn"], "granularities": ["channel"], "formats": ["int4"]}
    model = {"source": "hub", "id": "a/b", "revision": "main", "shape": shape}
    return {
        "models": {"m": {**model, "published": published} if published else model, "n": model},
        "corpora": {name: {"source": "builtin", "part": part, "window": 64} for name, part in parts},
        "calibrations": {"default": {"corpus": "text"}, "spare": {"corpus": "unused"}},
        "evaluate": {"perplexity": ["docs"]},
        "studies": {"a": {"models": ["m"], **study}, "b": {"models": ["n", "m"], **study}},
    }


def test_quantized_cells_and_tables_wait_and_full_precision_does_not():
    checks = BaselineChecks(Plan(check(config(docs=9.76))))
    assert checks.of_cell(checks.pattern)(SimpleNamespace(model="m", mitigation="rtn")) == ["results/checks/m.json"]
    assert checks.of_cell(checks.digest)(SimpleNamespace(model="m", mitigation="rtn")) == [
        "results/digests/check_baseline/m.json"
    ]
    assert checks.of_cell(checks.pattern)(SimpleNamespace(model="m", mitigation="none")) == []
    assert checks.of_study(checks.pattern, "b") == ["results/checks/n.json", "results/checks/m.json"]
    found = checks.inputs("m")
    assert {name: len(paths) for name, paths in found.items()} == {
        "calibrations": 1,
        "evaluations": 1,
        "measured": 1,
        "digests": 3,
    }
    assert "/none/none/-/bf16/perplexity/docs/" in found["measured"][0]
    assert "/text/" in found["calibrations"][0] and checks.inputs("n")["measured"] == []


def test_only_texts_that_a_cell_reads_are_checked():
    """A check reads windows of planned steps, so that `make clean-unused` knows them all."""
    content = config(docs=9.76)
    # calibrated on nothing
    content["transforms"] = {"turn": {"method": "random_hadamard", "calibration": "spare"}}
    content["studies"]["a"]["transforms"] = ["turn"]
    plan = Plan(check(content))
    checks = BaselineChecks(plan)
    made = {
        path for steps in plan.all_steps().values() for step in steps for path in (*step.outputs.values(), step.digest)
    }
    assert checks.calibrated == {"m": ["text"], "n": ["text"]}
    assert {path for model in checks.calibrated for paths in checks.inputs(model).values() for path in paths} <= made


def test_a_published_value_changes_no_key():
    plain, named = (Plan(check(config(**published))) for published in ({}, {"docs": 9.76}))
    assert plain.all_evaluations() == named.all_evaluations()
    assert BaselineChecks(plain).spec("m") != BaselineChecks(named).spec("m") and BaselineChecks(plain).spec(
        "n"
    ) == BaselineChecks(named).spec("n")


def test_a_published_value_of_an_unknown_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"models\.m\.published: unknown corpus 'doc' - did you mean 'docs'"):
        check(config(doc=9.76))


# -- the job ---------------------------------------------------------------------------------------


def windows(folder: Path, name: str, tokens: torch.Tensor) -> str:
    path = folder / f"{name}.safetensors"
    token_windows.save(path, tokens, {"corpus": name})
    return str(path)


def run_check(folder: Path, calibration: torch.Tensor, evaluation: torch.Tensor, perplexity: float) -> Done:
    write_json(folder / "measured.json", measured(perplexity))
    spec = {
        "model": "m",
        "calibrations": ["text"],
        "evaluations": ["docs"],
        "windows": [16],
        "published": [["docs", 9.76]],
    }
    paths = {
        "calibrations": windows(folder, "text", calibration),
        "evaluations": windows(folder, "docs", evaluation),
        "measured": str(folder / "measured.json"),
        "result": str(folder / "result.json"),
    }
    options = [option for name, path in paths.items() for option in (f"--{name}", path)]
    return run_script("check_baseline", "--spec", canonical(spec), *options)


def test_the_job_refuses_both_in_one_message_and_passes_what_is_sound(tmp_path):
    tokens = torch.randint(0, 5000, (16, 128), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 5000, (16, 128), generator=torch.Generator().manual_seed(1))
    shifted = torch.cat(
        [other[:, 64:], tokens[:, :64]], 1
    )  # half of every window is calibration text, at another place
    done = run_check(tmp_path, tokens, shifted, 13.16)
    assert done.returncode == 1 and "16 of 16 windows of corpus 'docs' share text with corpus 'text'" in done.stderr
    assert (
        "choose another split" in done.stderr
        and "full precision measures 13.1600" in done.stderr
        and not (tmp_path / "result.json").exists()
    )
    assert run_check(tmp_path, tokens, other, 9.75).returncode == 0
    found = read_json(tmp_path / "result.json")
    assert found["shared_windows"] == {"text, docs": 0} and found["published"]["docs"]["published"] == 9.76


@pytest.mark.slow
@pytest.mark.workflow
def test_a_wrong_checkpoint_stops_before_anything_is_quantized(tmp_path):
    checkout = Checkout.make(tmp_path / "quantgrid")
    content = checkout.config("smoke")
    name = next(iter(content["studies"]))
    content["models"]["reference-1m-planted"]["published"] = {"docs": 5.0}
    study = {
        "models": ["reference-1m-planted"],
        "transforms": ["none"],
        "mitigations": ["rtn"],
        "granularities": ["channel"],
        "formats": ["int4"],
        "evaluate": {"perplexity": ["docs"], "tasks": []},
    }
    content.update(studies={name: study}, results_dir="results-baseline", report={})
    checkout.write_config(content, "baseline")
    output = checkout.run("baseline", ok=False)
    assert "models.reference-1m-planted.published.docs: full precision measures" in output and "Instruct" in output
    assert not list(
        (checkout.folder / "results-baseline").glob("quantized/reference-1m-planted/none/rtn/**/quantgrid.json")
    )
    assert not list((checkout.folder / "results-baseline").glob("tables/*"))
