"""Predicted divergences of reference models, and the gain of an allocation over the uniform scheme of its bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from checkpoint_cases import saved
from family_models import calibrate
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.sensitivity import measure_sensitivities
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora.token_windows import tokenize
from quantgrid.evaluation.perplexity import evaluate, final_hidden
from quantgrid.ground.places import ROOT
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.lm_head import head_of
from quantgrid.quantization.allocation import Table, allocate
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import PackedCheckpoint, load_full_precision
from quantgrid.quantization.linear_groups import linear_groups
from quantgrid.quantization.scheme_errors import scheme_errors
from quantgrid.reporting.data.paired import estimate
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes

pytestmark = pytest.mark.slow
FP16 = {"scale_format": "fp16"}
CANDIDATES = {
    "int3 group-64": scheme("int3", granularity="group-64", **FP16),
    "int3 group-32": scheme("int3", granularity="group-32", **FP16),
    "int4 channel": scheme("int4", **FP16),
    "int4 group-64": scheme("int4", granularity="group-64", **FP16),
    "int4 group-32": scheme("int4", granularity="group-32", **FP16),
    "int5 group-64": scheme("int5", granularity="group-64", **FP16),
    "int8 channel": scheme("int8", **FP16),
}
UNIFORM = ("int4 group-64", "int5 group-64")


@dataclass(frozen=True)
class Measured:
    """A reference model with windows of text, statistics of both halves of the calibration, and a folder."""

    model: Path
    calibration: Tensor
    evaluation: Tensor
    statistics: dict[str, str]
    folder: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> Measured:
        model = ROOT / "models" / name
        calibration, evaluation = (
            tokenize(
                {"source": "local", "path": str(ROOT / "tests" / "data" / f"smoke-{part}.txt"), "window": window,
                 "windows": windows, "selection": "random"},
                model,
            )[0]
            for part, window, windows in (("calibration", 128, 32), ("evaluation", 128, 16))
        )  # fmt: skip
        halves = {"all": calibration, "first": calibration[:16], "second": calibration[16:]}
        statistics = {part: str(calibrate(model, folder / part, tokens)) for part, tokens in halves.items()}
        return cls(model, calibration, evaluation, statistics, folder)

    def divergences(self, schemes: CellSchemes, mitigation) -> np.ndarray:
        """Divergence of every evaluation window of a quantized model."""
        decoder, folder = DecoderFolder(self.model), self.folder / "cell"
        folder.mkdir(exist_ok=True)
        recipe = Recipe(fit([], decoder, None), schemes, mitigation, self.statistics["all"])
        model = streamed(PackedCheckpoint(saved(quantize_decoder(decoder, recipe), folder)))
        full = load_full_precision(self.model)
        reference = final_hidden(full, self.evaluation, 8)
        return np.array(evaluate(model, self.evaluation, reference, lambda: head_of(full), 8)["kl_divergence"])

    def table(self, mitigation) -> Table:
        """Predicted divergences under the candidates, on held-out statistics for a fitted mitigation."""
        decoder, fitted = DecoderFolder(self.model), mitigation is not rtn
        sensitivities = measure_sensitivities(streamed(FullPrecision(self.model)), self.calibration[:16], 0)
        solved = self.statistics["first" if fitted else "all"]
        recipe = Recipe(fit([], decoder, None), CellSchemes(candidates=CANDIDATES), mitigation, solved)
        errors = scheme_errors(decoder, recipe, self.statistics["second"] if fitted else None)
        return Table.of(errors, sensitivities.linears, linear_groups(decoder.shape))


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    return cache(lambda name: Measured.of(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("mitigation", [rtn, gptq])
@pytest.mark.parametrize("name", ["reference-4m", pytest.param("reference-12m", marks=pytest.mark.nightly)])
def test_predictions_of_uniform_models_are_near_what_is_measured(name, mitigation, of):
    made = of(name)
    table = made.table(mitigation)
    ratios = {
        scheme: table.described(table.uniform()[scheme])["predicted_kl"]
        / made.divergences(CellSchemes(CANDIDATES[scheme]), mitigation).mean()
        for scheme in UNIFORM
    }
    assert all(0.7 <= ratio <= 1.3 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("mitigation", [rtn, gptq])
def test_an_allocation_beats_the_uniform_scheme_of_its_bits(mitigation, of):
    made = of("reference-12m")
    table = made.table(mitigation)
    found = table.described(allocate(table, 4.25)[0])
    chosen = CellSchemes(candidates=CANDIDATES).allocated(found["schemes"])
    ours, uniform = (
        made.divergences(schemes, mitigation) for schemes in (chosen, CellSchemes(CANDIDATES["int4 group-64"]))
    )
    assert found["bits"] <= 4.25 and ours.mean() <= 0.8 * uniform.mean(), (ours.mean(), uniform.mean())
    difference, low, high, p = estimate([ours - uniform])
    assert low <= difference <= high < 0 and p < 0.001
    assert ours.mean() / 1.5 <= found["predicted_kl"] <= ours.mean() * 1.5
