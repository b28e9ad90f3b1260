"""Errors of linears on tokens outside the calibration set of a mitigation, against cells' recorded
errors and against outputs computed directly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from in_process import run_script
from quantgrid.calibration.collect import collect
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import to_tensors
from quantgrid.config import validation
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import write_tensors
from quantgrid.inference.transform import Transform, fit
from quantgrid.jobs.integrity import write_record
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import LINEARS, SITE_OF
from quantgrid.plan.pipeline import Plan
from quantgrid.quantization.cached import Recipe, decibel, quantize_decoder
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.quantization.linear_errors import linear_errors
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.primitives.norms import FoldNorms
from quantgrid.transforms.recipes import fold_norms, random_hadamard
from reference_decoder import site_inputs
from tiny_decoders import CASES, random_tokens, save

TINY = ROOT / "tests" / "data" / "tiny-llama"
INT4 = scheme("int4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(decoder, statistics files by name, inputs of the sites (tokens, n), tokens of a window) of a
    tiny Llama."""
    case = next(case for case in CASES if case.architecture.startswith("Llama") and case.hidden == 64)
    config, state = case.build(torch.float32)
    folder = save(tmp_path_factory.mktemp("model"), config, state)
    tokens, model, files = random_tokens(config, 6, 16), load_full_precision(folder), {}
    for name, skip in (("default", 0), ("later", 3)):
        found = collect(model, tokens, skip_first=skip)
        files[name] = str(folder / f"{name}.safetensors")
        write_tensors(
            files[name],
            {key: tensor for site, statistics in found.items() for key, tensor in to_tensors(site, statistics).items()},
        )
    return DecoderFolder(folder), files, site_inputs(state, config, tokens), 16


@pytest.mark.parametrize(
    "primitives", [[], fold_norms.primitives(), random_hadamard.primitives(1)], ids=["none", "folded", "rotated"]
)
@pytest.mark.parametrize("mitigation", [rtn, gptq])
def test_on_its_own_calibration_it_is_the_error_of_the_cell(made, mitigation, primitives):
    decoder, files, _, _ = made
    transform = fit(primitives, decoder, files["later"])
    cell = quantize_decoder(decoder, Recipe(transform, CellSchemes(INT4), mitigation, files["later"]))
    found = linear_errors(decoder, 1, LINEARS, transform, mitigation, INT4, "later", files)
    for linear in LINEARS:
        assert found[linear]["later"] == pytest.approx(decibel(cell.errors[f"1.{linear}"]["output_error"]), abs=0.02)
        assert found[linear]["weight"] == pytest.approx(decibel(cell.errors[f"1.{linear}"]["weight_error"]), abs=0.02)


def test_on_another_calibration_it_is_the_error_of_the_outputs_on_those_tokens(made):
    decoder, files, inputs, window = made
    found = linear_errors(decoder, 0, LINEARS, Transform(), rtn, INT4, "default", files)
    for linear in LINEARS:
        weight = decoder.layer(0).weights[linear].float()
        error, x = (weight - fake_quantize(weight, INT4)).double(), inputs[0, SITE_OF[linear]].double()
        later = x.unflatten(0, (-1, window))[:, 3:].flatten(0, 1)
        for name, rows in (("default", x), ("later", later)):
            wanted = -10 * math.log10(
                ((rows @ error.mT).square().sum() / (rows @ weight.double().mT).square().sum()).item()
            )
            assert found[linear][name] == pytest.approx(wanted, abs=1e-3), (linear, name)


def test_the_command_names_what_is_missing_and_prints_a_row_for_each_cell_and_linear(tmp_path):
    study = {
        "models": ["tiny"],
        "transforms": ["fold_norms"],
        "mitigations": ["rtn", "gptq-later", "gptq-seq"],
        "granularities": ["channel"],
        "formats": ["w4a16"],
    }
    text = {"source": "builtin", "window": 32, "windows": 4}
    content = {
        "results_dir": str(tmp_path / "results"),
        "models": {"tiny": {"source": "local", "path": str(TINY)}},
        "corpora": {"text": {**text, "part": "calibration"}, "docs": {**text, "part": "evaluation"}},
        "calibrations": {"default": {"corpus": "text"}, "later": {"corpus": "text", "skip_first": 1}},
        "mitigations": {
            "gptq-later": {"method": "gptq", "calibration": "later"},
            "gptq-seq": {"method": "gptq", "propagation": "sequential"},
        },
        "evaluate": {"perplexity": ["docs"]},
        "studies": {"s": study},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    words = (
        "--configfile",
        tmp_path / "config.yaml",
        "--model",
        "tiny",
        "--study",
        "s",
        "--layers",
        0,
        1,
        "--linears",
        "q",
        "down",
    )
    missing = run_script("inspect_linears", *words)
    assert missing.returncode and "not there yet; run the config first" in missing.stderr
    plan = Plan(validation.check(content))
    folder = Path(plan.fetch_model("tiny").outputs["folder"])
    folder.parent.mkdir(parents=True)
    folder.symlink_to(TINY)
    tokens = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    for name, entry in plan.config["calibrations"].items():
        found = collect(load_full_precision(TINY), tokens, skip_first=entry["skip_first"])
        tensors = {
            key: tensor for site, statistics in found.items() for key, tensor in to_tensors(site, statistics).items()
        }
        write_tensors(Path(plan.calibrate_model("tiny", name).outputs["statistics"]), tensors)
    cell = next(cell for cell in plan.cells if cell.quantized)
    fit(fold_norms.primitives(), DecoderFolder(folder), None).save(
        plan.fit_transform(cell).outputs["transform"], {"status": "ok"}
    )
    for rule, step, output in [
        ("fetch_model", plan.fetch_model("tiny"), "folder"),
        ("fit_transform", plan.fit_transform(cell), "transform"),
        *(
            ("calibrate_model", plan.calibrate_model("tiny", name), "statistics")
            for name in plan.config["calibrations"]
        ),
    ]:
        write_record(rule, [step.outputs[output]])
    done = run_script("inspect_linears", *words)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows[0] == ["transform", "mitigation", "linear", "weight", "default", "later"]
    assert [row[:3] for row in rows[2:]] == [
        ["fold_norms", mitigation, linear] for mitigation in ("rtn", "gptq-later") for linear in ("q", "down")
    ]
    first, second = (
        linear_errors(
            DecoderFolder(folder),
            layer,
            ["q"],
            Transform([FoldNorms()]),
            rtn,
            INT4,
            "default",
            {name: plan.calibrate_model("tiny", name).outputs["statistics"] for name in ("default", "later")},
        )["q"]
        for layer in (0, 1)
    )
    assert [float(value) for value in rows[2][3:]] == pytest.approx(
        [(first[name] + second[name]) / 2 for name in first], abs=0.006
    )
