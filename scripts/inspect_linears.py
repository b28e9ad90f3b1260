"""Measure errors of the linears of a study's cells on every calibration, over all tokens and over
later tokens.

    python scripts/inspect_linears.py --configfile config/oddities.yaml --model smollm2-135m
        --study gptq-statistics --layers 11 --linears down

Reads the model, calibrations and transforms of a finished run, and runs no model. Errors are means
over the layers named.
"""

import argparse
from functools import cache, partial
from pathlib import Path

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.config import entries, registry, validation
from quantgrid.config.cells import Cell
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import verify
from quantgrid.jobs.job import run
from quantgrid.models.plans import LINEARS
from quantgrid.plan.pipeline import Plan
from quantgrid.quantization.linear_errors import linear_errors
from quantgrid.schemes.quant_scheme import QuantScheme
from quantgrid.transforms.files import load_transform


@cache
def verified(path: str) -> str:
    """Return the path of a file of a run; :class:`ConfigError` if it is missing or differs from its
    record."""
    if not Path(path).exists():
        raise ConfigError(f"{path}: not there yet; run the config first, as far as its calibrations and transforms")
    verify(path)
    return path


def cell_errors(plan: Plan, cell: Cell, layers: list[int], linears: list[str], calibrations: list[str]) -> list[dict]:
    """Compute :func:`linear_errors` of a cell per layer of ``layers``; empty for a cell with
    sequential calibration (statistics from quantized layers)."""
    entry = entries.entry(plan.config, "mitigations", cell.mitigation)
    calibration, method = entry.pop("calibration", "default"), registry.method("mitigations", entry["method"])
    wanted, propagation = registry.split_propagation(method.resolve(entry, f"mitigations.{cell.mitigation}"))
    if propagation is not None:
        return []
    mitigation = partial(getattr(registry.load("mitigations", wanted["method"]), wanted["method"]), **wanted["options"])
    measured = {
        name: verified(plan.calibrate_model(cell.model, name).outputs["statistics"])
        for name in dict.fromkeys([calibration, *calibrations])
    }
    transform = load_transform(verified(plan.fit_transform(cell).outputs["transform"]))
    decoder = DecoderFolder(verified(plan.fetch_model(cell.model).outputs["folder"]))
    scheme = QuantScheme.from_dict(plan.quantize_model(cell).spec["schemes"]["weight"])
    return [
        linear_errors(decoder, layer, linears, transform, mitigation, scheme, calibration, measured)
        for layer in layers or range(decoder.shape.layers)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/oddities.yaml")
    parser.add_argument("--model", required=True)
    parser.add_argument("--study", required=True, help="whose cells are looked at; all of them round weights")
    parser.add_argument("--mitigations", nargs="+", default=[], help="only these")
    parser.add_argument("--layers", nargs="+", type=int, default=[], help="all, if none is named")
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=list(LINEARS))
    parser.add_argument(
        "--calibrations", nargs="+", default=["default", "later"], help="on whose tokens errors are measured"
    )
    asked = parser.parse_args()
    plan = Plan(validation.load(asked.configfile))
    columns = ["weight", *asked.calibrations]
    print(f"| transform | mitigation | linear | {' | '.join(columns)} |\n| :-- | :-- | :-- |{' --: |' * len(columns)}")
    for cell in (cell for cell in plan.studies[asked.study] if cell.model == asked.model and cell.quantized):
        if asked.mitigations and cell.mitigation not in asked.mitigations:
            continue
        found = cell_errors(plan, cell, asked.layers, asked.linears, asked.calibrations)
        for linear in asked.linears if found else ():
            means = (sum(layer[linear][name] for layer in found) / len(found) for name in columns)
            print(
                f"| {cell.transform} | {cell.mitigation} | {linear} | "
                f"{' | '.join(f'{value:.2f}' for value in means)} |",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
