"""Every step that does not train, on a simulated device: it computes what it does on the CPU, and no tensors
of two devices meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

import simulated_device
from in_process import run_script
from quantgrid.config import check, registry
from quantgrid.config.cells import MIXED, Cell
from quantgrid.ground.places import ROOT
from quantgrid.ground.provenance import canonical
from quantgrid.ground.storage import read_json, read_tensors
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.steps import Step
from selection import others_slow

MODEL, TEXT = "reference-1m-planted", "docs"
# provenance: the device itself, and digests of files that differ in the last bit
APART = {"compute", "sha256", "placement"}
CODES, FLOATS, NUMBERS = 0.01, 2e-3, 5e-3  # largest share of other codes, largest relative errors
# between them most primitives and mitigations that do not train, most formats
QUICK = {
    ("none", "rtn", "int4"),
    ("duquant", "gptq-running", "int4"),
    ("perq", "gptq", "nvfp4_46"),
}


def content() -> dict[str, Any]:
    """The smoke config on few and short windows."""
    found = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    for corpus in found["corpora"].values():
        corpus |= {"path": str(ROOT / corpus["path"]), "windows": 24, "window": 16}
    found["evaluation"] = {"batch_size": 2, "residual_error_windows": 2}
    return found


def trains(cell: Cell) -> bool:
    plan = PLAN.config
    transform = plan["transforms"].get(cell.transform.rpartition("-s")[0], plan["transforms"].get(cell.transform))
    mitigation = plan["mitigations"][cell.mitigation]["method"] if cell.mitigation != "none" else "none"
    learned = transform is not None and registry.method("transforms", transform["method"]).learned
    return learned or bool(registry.method("mitigations", mitigation).training)


PLAN = Plan(check({**content(), "results_dir": "results"}))
CELLS = [cell for cell in PLAN.cells if not trains(cell) and cell.granularity != MIXED]
[SHARD] = PLAN.shards(TEXT)


@dataclass
class Run:
    """Files of the CPU's steps in ``folder``, made when they are first read."""

    folder: Path
    made: set[str] = field(default_factory=set)

    def cpu(self, step: Step) -> None:
        """Make the outputs of ``step`` and of those before it, on the CPU."""
        if step.key not in self.made:
            self._run(step, "cpu", {name: self.folder / path for name, path in step.outputs.items()})
            self.made.add(step.key)

    def simulated(self, step: Step) -> dict[str, Path]:
        """Outputs of ``step`` on the simulated device, from inputs that the CPU made."""
        outputs = {name: self.folder / simulated_device.NAME / path for name, path in step.outputs.items()}
        self._run(step, simulated_device.NAME, outputs)
        return outputs

    def _run(self, step: Step, device: str, outputs: dict[str, Path]) -> None:
        compute = step.spec.get("compute")
        spec = {**step.spec, **({"compute": {**compute, "device": device}} if compute else {})}
        words = ["--spec", canonical(spec)]
        for name, path in {**step.inputs, **outputs}.items():
            words += [f"--{name}", str(self.folder / path)]
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with sdpa_kernel(SDPBackend.MATH):  # as on the simulated device: rounded inputs amplify the last bit
            done = run_script(step.rule, *words)
        assert done.returncode == 0, done.stderr

    def compare(self, step: Step) -> None:
        """Check that both devices leave the same content."""
        self.cpu(step)
        for name, path in self.simulated(step).items():
            wanted = self.folder / step.outputs[name]
            if path.suffix == ".json":
                numbers_agree(read_json(path), read_json(wanted), f"{step.rule} {path.name}")
            elif path.suffix == ".safetensors":
                tensors_agree(read_tensors(path), read_tensors(wanted), step.rule)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    simulated_device.register()
    made = Run(tmp_path_factory.mktemp("simulated"))
    for step in before_cells():
        made.cpu(step)
    return made


def before_cells() -> Iterator[Step]:
    yield PLAN.fetch_model(MODEL)
    yield from (PLAN.tokenize_corpus(MODEL, corpus) for corpus in PLAN.config["corpora"])
    yield PLAN.tokenize_all(MODEL, TEXT)
    yield from (PLAN.calibrate_model(MODEL, "default"), PLAN.evaluate_reference(MODEL, TEXT, SHARD))


def tensors_agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == wanted.keys(), where
    for name, tensor in wanted.items():
        if name.rpartition(".")[2].startswith(("left", "right")):
            continue  # singular vectors up to their signs; the errors of the linears compare the products
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.dtype.is_floating_point:
            one, other = found[name].double(), tensor.double()
            error = (one - other).abs().max() / other.abs().max().clamp(min=1e-30) if other.numel() else 0.0
            assert error < FLOATS, (where, name, error)
        else:
            assert (found[name] != tensor).double().mean() <= CODES, (where, name)


def numbers_agree(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name in wanted.keys() - APART:
            numbers_agree(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, pair in enumerate(zip(found, wanted)):
            numbers_agree(*pair, f"{where}.{number}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=NUMBERS, abs=1e-6), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("rule", ["calibrate_model", "evaluate_reference"])
def test_steps_of_a_model(rule, run):
    (step,) = (step for step in before_cells() if step.rule == rule)
    run.compare(step)


@pytest.mark.parametrize(
    "cell", others_slow(CELLS, lambda cell: (cell.transform, cell.mitigation, cell.format) in QUICK), ids=str
)
def test_steps_of_a_cell(cell, run):
    for step in (PLAN.fit_transform(cell), PLAN.quantize_model(cell), PLAN.evaluate_perplexity(cell, TEXT, SHARD)):
        run.compare(step)


@pytest.mark.parametrize("transform", ["none", "duquant"])
def test_distributions_and_residual_errors(transform, run):
    cell = next(cell for cell in CELLS if cell.transform == transform)
    for step in (PLAN.fit_transform(cell), PLAN.quantize_model(cell)):
        run.cpu(step)
    run.compare(PLAN.measure_distributions(cell))
    run.compare(PLAN.measure_residual_error(cell, TEXT))


@pytest.mark.slow
def test_zero_shot_tasks(run):
    cell = next(cell for cell in CELLS if (cell.transform, cell.mitigation, cell.format) == ("none", "rtn", "int4"))
    for step in (PLAN.fit_transform(cell), PLAN.quantize_model(cell)):
        run.cpu(step)
    run.compare(PLAN.evaluate_tasks(cell, tuple(PLAN.config["tasks"])))


def test_tensors_of_two_devices_do_not_meet():
    device = simulated_device.register()
    here, there = torch.ones(3), torch.ones(3, device=device)
    assert (there + there).cpu().tolist() == [2.0] * 3 and (there * torch.tensor(2.0)).device.type == "sim"
    for meet in (lambda: here + there, lambda: there.add_(here), lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="tensors on sim and on cpu"):
            meet()
