"""Errors of the linears of a study's cells, each measured on every calibration: those of all tokens beside those of later ones.

    python scripts/inspect_linears.py --configfile config/oddities.yaml --model smollm2-135m --study gptq-statistics --layers 11 --linears down

Reads the model, the calibrations and the transforms that a run left, and runs no model. Of several layers the mean over them is shown.
"""

import argparse
from functools import cache, partial
from pathlib import Path

from quantgrid import config as configs
from quantgrid import grid, registry
from quantgrid.architecture import LINEARS
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import ConfigError
from quantgrid.grid import Cell
from quantgrid.integrity import verify
from quantgrid.job import run
from quantgrid.linear_errors import linear_errors
from quantgrid.pipeline import Plan
from quantgrid.quantizer import QuantScheme
from quantgrid.transforms.composition import Transform


@cache
def verified(path: str) -> str:
    """The path of what a run left; :class:`ConfigError` where it is not there, or not what its job wrote."""
    if not Path(path).exists():
        raise ConfigError(f"{path}: not there yet; run the config first, as far as its calibrations and transforms")
    verify(path)
    return path


def cell_errors(plan: Plan, cell: Cell, layers: list[int], linears: list[str], calibrations: list[str]) -> list[dict]:
    """Per layer of ``layers`` what :func:`linear_errors` gives for a cell; empty for one whose statistics are taken behind quantized layers."""
    entry = grid.entry(plan.config, "mitigations", cell.mitigation)
    told, method = entry.pop("calibration", "default"), registry.method("mitigations", entry["method"])
    wanted, propagation = registry.split_propagation(method.resolve(entry, f"mitigations.{cell.mitigation}"))
    if propagation is not None:
        return []
    mitigation = partial(getattr(registry.load("mitigations", wanted["method"]), wanted["method"]), **wanted["options"])
    measured = {name: verified(plan.calibrate_model(cell.model, name).outputs["statistics"]) for name in dict.fromkeys([told, *calibrations])}
    transform = Transform.load(verified(plan.fit_transform(cell).outputs["transform"]))
    decoder = DecoderFolder(verified(plan.fetch_model(cell.model).outputs["folder"]))
    scheme = QuantScheme.from_dict(plan.quantize_model(cell).spec["schemes"]["weight"])
    return [linear_errors(decoder, layer, linears, transform, mitigation, scheme, told, measured)
            for layer in layers or range(decoder.shape.layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/oddities.yaml")
    parser.add_argument("--model", required=True)
    parser.add_argument("--study", required=True, help="whose cells are looked at; all of them round weights")
    parser.add_argument("--mitigations", nargs="+", default=[], help="only these")
    parser.add_argument("--layers", nargs="+", type=int, default=[], help="all, if none is named")
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=list(LINEARS))
    parser.add_argument("--calibrations", nargs="+", default=["default", "later"], help="on whose tokens errors are measured")
    asked = parser.parse_args()
    plan = Plan(configs.load(asked.configfile))
    columns = ["weight", *asked.calibrations]
    print(f"| transform | mitigation | linear | {' | '.join(columns)} |\n| :-- | :-- | :-- |{' --: |' * len(columns)}")
    for cell in (cell for cell in plan.studies[asked.study] if cell.model == asked.model and cell.quantized):
        if asked.mitigations and cell.mitigation not in asked.mitigations:
            continue
        found = cell_errors(plan, cell, asked.layers, asked.linears, asked.calibrations)
        for linear in asked.linears if found else ():
            means = (sum(layer[linear][name] for layer in found) / len(found) for name in columns)
            print(f"| {cell.transform} | {cell.mitigation} | {linear} | {' | '.join(f'{value:.2f}' for value in means)} |", flush=True)


if __name__ == "__main__":
    run(main)
