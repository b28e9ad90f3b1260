"""GPTQ with half as many tokens as channels: better than rounding on other tokens with a shrunk second moment,
worse without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantgrid.calibration.experts import shrunk
from quantgrid.corpora import token_windows
from quantgrid.ground.places import ROOT
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.folders import BUILTIN
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.schemes import scheme
from reference_statistics import statistics_of

INT4 = scheme("int4")
FOLDER, DATA = BUILTIN / "reference-1m", ROOT / "tests" / "data"


@torch.no_grad()
def down_inputs(text: str) -> list[Tensor]:
    """Inputs (tokens, n) of the down projections of all layers on 8 windows of a text, without first tokens."""
    entry = {"source": "local", "path": str(DATA / f"smoke-{text}.txt"), "windows": 8, "window": 128}
    model, found = load_full_precision(FOLDER), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs: found.append(inputs[0][:, 1:].flatten(0, 1))
        )
    model(token_windows.tokenize(entry, FOLDER)[0], use_cache=False)
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    """Squared output errors on the evaluation text by method, layer by layer; n / 2 calibration tokens."""
    model = load_full_precision(FOLDER)
    found: dict[str, list[float]] = {"rtn": [], "shrunk": [], "plain": []}
    for layer, seen, unseen in zip(model.model.layers, down_inputs("calibration"), down_inputs("evaluation")):
        weight = layer.mlp.down_proj.weight.detach()
        drawn = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[: weight.shape[1] // 2]
        plain = statistics_of(seen[drawn])
        for name, solved in {
            "rtn": rtn(weight, plain, INT4),
            "plain": gptq(weight, plain, INT4, damping=0.01),
            "shrunk": gptq(weight, shrunk(plain), INT4, damping=0.01),
        }.items():
            found[name].append((unseen @ (weight - solved.weight()).mT).square().sum().item())
    return found


@pytest.mark.parametrize("layer", range(4))
def test_a_shrunk_second_moment_is_better_than_rounding(layer, errors):
    assert errors["shrunk"][layer] < 0.9 * errors["rtn"][layer]
    assert errors["shrunk"][layer] < 0.8 * errors["plain"][layer]


@pytest.mark.parametrize("layer", [1, 2])
def test_few_tokens_alone_are_worse_than_rounding(layer, errors):
    assert errors["plain"][layer] > 1.1 * errors["rtn"][layer]
