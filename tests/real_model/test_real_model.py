"""SmolLM2-135M as pip brings it: fetched by its checksum, unchanged by transforms, quantized and
evaluated in one cell."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from quantgrid.calibration import collect
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import to_tensors
from quantgrid.config import validation
from quantgrid.config.registry import TRANSFORMS, load
from quantgrid.corpora import token_windows
from quantgrid.evaluation.perplexity import evaluate
from quantgrid.evaluation.significance import perplexity
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import write_tensors
from quantgrid.inference.transform import fit, folded_ends
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.fetch import fetch
from quantgrid.models.lm_head import Head
from quantgrid.models.plans import SITES
from quantgrid.quantization.cached import Recipe, quantize_decoder, summarize
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default config's model in canonical form."""
    entry = validation.load(ROOT / "config" / "config.yaml")["models"]["smollm2-135m"]
    path = tmp_path_factory.mktemp("model") / "smollm2"
    fetch(entry, path)
    return path


@pytest.fixture(scope="module")
def windows(folder: Path) -> torch.Tensor:
    return token_windows.tokenize({"source": "builtin", "part": "evaluation", "windows": 2, "window": 128}, folder)[0]


@pytest.fixture(scope="module")
def statistics(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, _ = token_windows.tokenize(
        {"source": "builtin", "part": "calibration", "windows": 4, "window": 256}, folder
    )
    found = collect.collect(load_full_precision(folder), tokens, samples=64)
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    write_tensors(
        path, {name: tensor for site, part in found.items() for name, tensor in to_tensors(site, part).items()}
    )
    return path


# What fits 9 heads and 576 channels, and searches that end soon.
OPTIONS = {
    "quarot": {"mixing": "orthogonal"},
    "duquant": {"block_size": 64, "steps": 8},
    "awq": {"points": 3},
    "outlier_suppression_plus": {"points": 3},
}


def transformed(method: str, folder: Path, statistics: Path):
    options = TRANSFORMS[method].resolve({"method": method, **OPTIONS.get(method, {})}, method)["options"]
    given = {"seed": 0} if TRANSFORMS[method].seeded else {}
    if TRANSFORMS[method].is_fitted_to_scheme(options):
        given["schemes"] = CellSchemes(scheme("int4"))
    return fit(load("transforms", method).primitives(**options, **given), DecoderFolder(folder), statistics)


@pytest.fixture(scope="module")
def reference(folder: Path, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(final hidden states, lm_head, logits) of the unmodified model."""
    model = load_full_precision(folder)
    with torch.no_grad():
        hidden = model.model(windows).last_hidden_state
    return hidden, model.lm_head.weight.detach(), (hidden @ model.lm_head.weight.detach().T)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(TRANSFORMS))
def test_every_transform_leaves_the_logits_as_they_were(
    method: str, folder: Path, statistics: Path, reference, windows, tmp_path: Path, monkeypatch
):
    """Quantizers off, weights kept in float32: 1e-3 absolute on logits of magnitude 10 to 30,
    through transformers in float32."""
    monkeypatch.setattr(
        "quantgrid.quantization.checkpoints.CheckpointContent.add_plain",
        lambda self, tensors, dtype=None: self.tensors.update(
            {name: tensor.float() for name, tensor in tensors.items()}
        ),
    )
    monkeypatch.setattr(
        "quantgrid.quantization.cached.folded_ends",
        lambda transform, decoder, dtype: folded_ends(transform, decoder, torch.float32),
    )
    done = quantize_decoder(
        DecoderFolder(folder), Recipe(transformed(method, folder, statistics), CellSchemes(), None, None)
    )
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
    with torch.no_grad():
        logits = load_quantized(tmp_path)(windows).logits
    assert (logits - reference[2]).abs().max() < 1e-3


def test_one_cell_from_codes_on_disk_to_perplexity(folder: Path, statistics: Path, reference, windows, tmp_path: Path):
    """INT8 is close to full precision; W4A4 untransformed is far worse."""
    decoder, identity = DecoderFolder(folder), transformed("none", folder, statistics)
    measured = {}
    for name, mitigation in (("int8", rtn), ("int4", rtn)):
        everywhere = {site: [activation_scheme(name)] for site in SITES}
        done = quantize_decoder(
            decoder, Recipe(identity, CellSchemes(scheme(name), everywhere), mitigation, str(statistics))
        )
        save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
        losses = evaluate(load_quantized(tmp_path), windows, reference[0], lambda: Head(reference[1]), batch_size=2)
        measured[name] = perplexity(losses["negative_log_likelihood"])[0], sum(losses["kl_divergence"]) / 2
    assert measured["int8"][1] < 0.5 < measured["int4"][1]
    assert measured["int8"][0] < measured["int4"][0] / 3


@pytest.mark.slow
def test_gptq_leaves_less_output_error_than_rtn(folder: Path, statistics: Path):
    """In every linear, and by 3 dB over the model."""
    decoder, identity = DecoderFolder(folder), transformed("none", folder, statistics)
    rounded = quantize_decoder(decoder, Recipe(identity, CellSchemes(scheme("int4")), rtn, str(statistics)))
    solved = quantize_decoder(
        decoder, Recipe(identity, CellSchemes(scheme("int4")), partial(gptq, damping=0.01), str(statistics))
    )
    assert all(solved.errors[key]["output_error"] < rounded.errors[key]["output_error"] for key in rounded.errors)
    assert summarize(solved.errors)["output_sqnr_db"] > summarize(rounded.errors)["output_sqnr_db"] + 3
