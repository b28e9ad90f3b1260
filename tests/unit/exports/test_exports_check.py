"""Checks of exports: figures that are no numbers, failed cells, results in the dtype of the folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from export_cases import SERVED, cell
from quantgrid.exports import gguf_check
from quantgrid.exports.check import Checked, largest, mean_divergence
from quantgrid.exports.compressed_tensors import CompressedTensors
from quantgrid.exports.export import export
from quantgrid.exports.gguf_check import GGUFChecked
from quantgrid.exports.input_check import InputsChecked
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json, read_tensors, sha256_of, write_json, write_tensors
from quantgrid.quantization.checkpoints import save_failed

CT = "compressed-tensors"
CHECKED = Checked("transformers", "float32", 96, 0.1, 1e-4, 1e-3, 9.0, 0.1, 9.0, 2, 48)
WHOLE = GGUFChecked(
    **vars(CHECKED), llama_cpp_kl=1e-4, rounding_kl=1e-4, llama_cpp_positions=4, tokens_equal=True, texts=7
)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("figure", ["max_logit_difference", "kl", "perplexity", "served_kl"])
def test_a_figure_that_is_no_number_is_rejected(figure, value):
    assert CHECKED.is_accepted and WHOLE.is_accepted
    for checked in (CHECKED, WHOLE):
        found = replace(checked, **{figure: value})
        assert not found.is_accepted and found.to_dict()[figure] is None
        json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("figure", ["llama_cpp_kl", "rounding_kl"])
def test_llama_cpp_is_rejected_without_a_number(figure):
    assert not replace(WHOLE, **{figure: math.nan}).is_accepted


@pytest.mark.parametrize("exact", [False, True])
def test_results_in_the_dtype_of_the_folder_have_a_bound(exact):
    checked = replace(CHECKED, max_logit_difference=0.0, kl=0.0, kl_accepted=0.0) if exact else CHECKED
    served = replace(checked, served_dtype="bfloat16", served_kl=0.04, served_kl_accepted=0.05)
    assert served.is_accepted and "accepted: 0.05" in served.lines()[0]
    assert not replace(served, served_kl=5.0).is_accepted
    assert not replace(served, served_kl_accepted=0.0).is_accepted


@pytest.mark.parametrize("entry", [{"preset": "int4"}, {"preset": "w8a8"}], ids=["int4", "w8a8"])
def test_a_folder_without_rounded_inputs_is_rejected(sources, tmp_path, monkeypatch, entry):
    """Bounds of the logits alone would accept it."""
    made, writes = cell(sources(), tmp_path / "cell", entry), CompressedTensors.config

    def without(self):
        config = writes(self)
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        return config

    report = export(sources().model, made, None, sources().windows, CT, tmp_path / "out")
    inputs = report["check"]["inputs"]
    assert inputs["linears"] == 14 and inputs["unrounded"] == 0
    assert inputs["least_error"] > 0.9 and inputs["differing"] < 0.2
    monkeypatch.setattr(CompressedTensors, "config", without)
    with pytest.raises(ConfigError, match="14 linears do not round"):
        export(sources().model, made, None, sources().windows, CT, tmp_path / "other")
    found = read_json(tmp_path / "other.rejected" / "export.json")["check"]["inputs"]
    assert found["unrounded"] == 14 and found["largest_error"] == 0


def test_comparisons_of_inputs_that_are_no_numbers_are_rejected_and_written():
    inputs = InputsChecked(14, 0.0, 0.0, 1.0, 1.0, 0.0, 0)
    assert replace(CHECKED, inputs=inputs).is_accepted
    for figure in ("differing", "least_error", "largest_error", "output_error"):
        found = replace(CHECKED, inputs=replace(inputs, **{figure: math.nan}))
        assert not found.is_accepted and found.to_dict()["inputs"][figure] is None


def test_means_and_maxima_keep_nan():
    assert mean_divergence([-1e-9, 0.0]) == 0 and mean_divergence([0.5, 1.5]) == 1
    assert math.isnan(mean_divergence([0.5, math.nan])) and math.isnan(largest([0.5, math.nan, 1.0]))
    assert math.isnan(gguf_check._divergence(torch.zeros(2, 3), torch.full((2, 3), math.nan)))


def test_a_failed_cell_is_refused_with_its_reason(sources, tmp_path):
    folder = tmp_path / "cell"
    folder.mkdir()
    save_failed(folder / "model.safetensors", folder / "quantgrid.json", {}, "the Cholesky factorization failed")
    with pytest.raises(ConfigError, match="the cell failed and cannot be exported: the Cholesky factorization failed"):
        export(sources().model, folder, None, sources().windows, "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cell_without_finite_logits_is_refused(sources, tmp_path):
    made = damaged(cell(sources(), tmp_path / "cell", SERVED["w4a16"], "group-32"), "model.norm.weight")
    with pytest.raises(ConfigError, match="it computes NaN or infinite logits"):
        export(sources().model, made, None, sources().windows, CT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cell_that_cannot_be_rounded_is_refused(sources, tmp_path):
    made = damaged(cell(sources(), tmp_path / "cell", SERVED["w8a8"]), "model.layers.1.input_layernorm.weight")
    with pytest.raises(ConfigError, match="out: the check of the export failed: .*NaN"):
        export(sources().model, made, None, sources().windows, CT, tmp_path / "out")


def damaged(folder, name):
    """The cell in ``folder`` with NaN in the tensor ``name``."""
    tensors = read_tensors(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], math.nan)
    write_tensors(folder / "model.safetensors", tensors)
    about = read_json(folder / "quantgrid.json")
    write_json(folder / "quantgrid.json", {**about, "sha256": sha256_of(folder / "model.safetensors")})
    return folder
