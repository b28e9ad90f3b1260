"""The smoke studies on a mixture of experts: every transform and mitigation that it can have, from a local
folder to the report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkouts import Checkout
from family_models import build
from quantgrid.config import registry
from quantgrid.config.grid import expand_studies
from quantgrid.models.folders import BUILTIN

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(1800)]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
PAIRED = {name for name, method in registry.METHODS["mitigations"].items() if method.paired}
EXPERTS = ("expert_tokens_smallest", "expert_tokens_median", "experts_below_width")


def on_experts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The smoke config on the model in ``folder``, without the mitigations that experts cannot have."""
    for study in config["studies"].values():
        study["models"] = ["experts"]
        study["also"] = [also for also in study.get("also", []) if not PAIRED & {*also.get("mitigations", [])}]
    config["studies"]["pairs"]["also"].append({"transforms": ["os-plus"], "mitigations": ["gptq"]})
    config["studies"]["methods"]["table"]["metrics"].append("expert_tokens_smallest")
    for name in PAIRED:
        config["mitigations"].pop(name)
    config["report"].pop("distributions")
    return {**config, "models": {"experts": {"source": "local", "path": str(folder)}}, "results_dir": "results-experts"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Checkout, Path]:
    """A checkout in which the config ran, and its results."""
    folder = build("Qwen2MoeForCausalLM", tmp_path_factory.mktemp("model") / "experts", **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUILTIN / "reference-1m" / name, folder / name)
    checkout = Checkout.make(tmp_path_factory.mktemp("run") / "checkout")
    checkout.write_config(on_experts(checkout.config(), folder), "experts")
    checkout.run("experts")
    return checkout, checkout.folder / "results-experts"


def test_no_cell_failed_and_every_gate_passed(finished):
    checkout, results = finished
    rows = list(csv.DictReader((results / "results.csv").open()))
    config = checkout.config("experts")
    cells = expand_studies(config)
    assert {row["status"] for row in rows} == {"ok"} and {row["model"] for row in rows} == {"experts"}
    assert {tuple(row[axis] for axis in cells[0].axes) for row in rows} == {tuple(cell.axes.values()) for cell in cells}
    for axis, without in (("transforms", {"none"}), ("mitigations", {"none", *PAIRED})):
        used = {entry["method"] for entry in config[axis].values()} - {"none"}
        assert used == set(registry.METHODS[axis]) - without
    gates = [json.loads(path.read_text()) for path in results.glob("gates/**/*.json")]
    assert len(gates) > len({cell.transform for cell in cells} - {"none"})
    assert all(gate["logits"] < 1e-2 and gate["divergence"] < 1e-6 for gate in gates)
    assert (results / "report.html").stat().st_size > 0


def test_every_quantized_cell_counts_the_tokens_of_its_experts(finished):
    _, results = finished
    rows = list(csv.DictReader((results / "results.csv").open()))
    quantized = {row["cell"] for row in rows if row["format"] != "bf16"}
    for metric in EXPERTS:
        found = {row["cell"]: float(row["value"]) for row in rows if row["metric"] == metric}
        assert found.keys() == quantized and len({*found.values()}) == 1
    tokens = 32 * 128 * 2 / 4 / 96  # of an expert per channel, on average
    smallest, median = (next(float(row["value"]) for row in rows if row["metric"] == metric) for metric in EXPERTS[:2])
    assert 0 < smallest <= median < 2 * tokens
