"""Tables of docs/explanation/oddities.md: linears by `scripts/inspect_linears.py`, inputs from the calibrations
of the run, and its `residual-error.csv`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
from safetensors import safe_open

from quantgrid.calibration.collect import site_name
from quantgrid.calibration.statistics import SiteStatistics, from_file
from quantgrid.config import validation
from quantgrid.jobs.integrity import verify
from quantgrid.plan.pipeline import Plan

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m"
SPIKED = (11, 28)  # layers whose down projection sees a first token far beyond all others
ROTATED = (4, 15, 26)
LAYERS = (0, 5, 10, 11, 12, 15, 18, 20, 24, 28, 29)
CALIBRATION = {
    "rtn": "",
    "gptq-later": "later (`skip_first: 1`)",
    "gptq-later-8": "later-8 (`skip_first: 8`)",
}  # else default


def inspected(*words: object) -> list[dict[str, str]]:
    """Rows that the command prints, by the heads of its columns."""
    command = [sys.executable, str(ROOT / "scripts" / "inspect_linears.py"), "--model", MODEL, *map(str, words)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip().splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, row, strict=True)) for row in rows]


def markdown(heads: list[str], rows: list[list[str]], texts: int) -> str:
    """A table whose first ``texts`` columns are text."""
    lines = [heads, [":--"] * texts + ["--:"] * (len(heads) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def inputs(plan: Plan, calibration: str, layer: int) -> SiteStatistics:
    """Statistics of the input of a down projection."""
    statistics = ROOT / plan.calibrate_model(MODEL, calibration).outputs["statistics"]
    verify(statistics)
    with safe_open(statistics, "pt") as file:
        return from_file(file, site_name(layer, "down_input"))


def magnitudes() -> str:
    """Inputs of down projections: the largest value and the mean square, of all tokens and without
    the first one of a window."""
    plan, rows = Plan(validation.load(ROOT / "config" / "oddities.yaml")), []
    for layer in SPIKED:
        found = [inputs(plan, name, layer) for name in ("default", "later")]
        rows.append(
            [
                f"{layer}",
                *(f"{max(-each.minimum.min(), each.maximum.max()):.0f}" for each in found),
                *(f"{each.second_moment.diagonal().mean():.3g}" for each in found),
            ]
        )
    heads = ["layer", "largest input", "without first tokens", "mean square", "without first tokens"]
    return markdown(heads, rows, texts=0)


def first_tokens() -> str:
    """Down projections behind the first tokens: errors of the weight, and of the output on all
    tokens and on all but the first of a window."""
    found = [
        {
            row["mitigation"]: row
            for row in inspected("--study", "gptq-statistics", "--layers", layer, "--linears", "down")
        }
        for layer in SPIKED
    ]
    columns = ("weight", "default", "later")
    heads = [
        "mitigation",
        "calibration it reads",
        *(f"layer {layer}: {column}" for layer in SPIKED for column in columns),
    ]
    rows = [
        [f"`{name}`", CALIBRATION.get(name, "default"), *(layer[name][column] for layer in found for column in columns)]
        for name in found[0]
        if name != "rtn-later"
    ]
    return markdown(heads, rows, texts=2)


def rotation_parts() -> str:
    """Round to nearest behind the parts of a rotation, mean over some layers: output error on all
    tokens / weight error, by linear."""
    found = inspected(
        "--study", "rotation-parts", "--mitigations", "rtn", "--layers", *ROTATED, "--calibrations", "default"
    )
    linears, transforms = (list(dict.fromkeys(row[axis] for row in found)) for axis in ("linear", "transform"))
    values = {(row["transform"], row["linear"]): f"{row['default']} / {row['weight']}" for row in found}
    return markdown(
        ["transform", *linears],
        [[f"`{name}`", *(values[name, linear] for linear in linears)] for name in transforms],
        texts=1,
    )


def residual_error() -> str:
    """The relative error of the residual stream behind layers, what the layer adds and what it
    passes on: round to nearest / GPTQ."""
    verify(ROOT / "results-oddities" / "residual-error.csv")
    found = pd.read_csv(ROOT / "results-oddities" / "residual-error.csv")
    found = found[found["model"] == MODEL].set_index(["format", "mitigation", "layer"])
    sides = {"int4": "weights and activations", "w4a16": "weights alone"}
    parts = {"error": "error", "added": "added", "passed_on": "passed on"}
    rows = [
        [
            f"{layer}",
            *(
                " / ".join(f"{found.loc[(form, mitigation, layer + 1), part]:.3f}" for mitigation in ("rtn", "gptq"))
                for form in sides
                for part in parts
            ),
        ]
        for layer in LAYERS
    ]
    return markdown(
        ["after layer", *(f"{side}: {part}" for side in sides.values() for part in parts.values())], rows, texts=0
    )


TABLES = {
    "residual-error": residual_error,
    "magnitudes": magnitudes,
    "first-tokens": first_tokens,
    "rotation-parts": rotation_parts,
}
