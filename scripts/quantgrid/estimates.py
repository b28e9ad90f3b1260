"""What a run would take, before it is run: cells, jobs, hours and disk, from the shapes of the models and stated costs. Standard library only.

Hours are floating-point operations over the rates of :class:`Machine`, plus a fixed time per job. They are meant to tell a day from a
month: a factor of two either way is to be expected. Operations counted: 2 per weight and token of a forward pass, 6 of a training
step, 2 n^2 per token of a second moment, 2 m n^2 + n^3 of GPTQ, 20 m n min(m, n) of a singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import grid
from .architecture import LINEARS, ModelShape, layer_moments, layer_weights
from .demands import DECOMPOSED
from .pipeline import Plan
from .steps import Step

WHOLE_CORPUS = 300_000  # tokens of a corpus that is taken whole: WikiText-2 test is 250,000 to 340,000, by tokenizer
# Tokens of all requests of a task, in thousands: documents x choices x tokens of a request, rounded from the sizes of the data sets.
TASK_TOKENS = {"mmlu": 6700, "mathqa": 1000, "arc_challenge": 190, "arc_easy": 380, "hellaswag": 4000, "winogrande": 80, "boolq": 1000,
               "lambada_openai": 460, "piqa": 180, "sst2": 50, "openbookqa": 40, "social_iqa": 230}
OTHER_TASK = 50  # thousand tokens of a task that is not in the list
ITEM = 0.24  # thousand tokens of the requests of one item of a builtin task
LONGEST = 2000  # hours on a machine that nobody would wait for, so that it goes unmentioned
SIDE_BY_SIDE = 2  # packed checkpoints that exist at a time, unless they are kept
# Minutes after which a job counts as stuck: so many times its estimate, at least the first, at most the second number.
PATIENCE, SHORTEST, LONGEST_JOB = 6, 60, 24 * 60
SOLVED = ("gptq", "gptaq", "caldera", "sparse_outliers")


@dataclass(frozen=True)
class Machine:
    """``products``: FLOP/s of large matrix products in the dtype of the model; ``solver``: of float32 factorizations and moments; ``requests``:
    thousand tokens a second that launching short requests of tasks allows; ``start``: seconds of a job beside that; ``jobs``: side by side."""

    name: str
    products: float
    solver: float
    requests: float
    start: float
    jobs: int


# Stated for a GPU (about 30 % of the bfloat16 peak of an A100, 30 ms for a request of 100 tokens), whose memory is not asked about; for the CPU
# from SmolLM2-135M on two cores of an AMD EPYC (AVX2, float32, one thread a job): an evaluation of 3072 tokens takes 28 s, a quantization 25 s;
# jobs on models of a few million weights take 2 to 9 s, most of it their start.
GPU, CPU = Machine("one A100-class GPU", 1e14, 1e13, 3.3, 30.0, 1), Machine("2 CPU cores", 7e10, 4e10, 3.3, 5.0, 2)


def weights_of(shape: ModelShape) -> int:
    """Weights of all linears of the decoder layers."""
    return shape.layers * layer_weights(shape)


def ends_of(shape: ModelShape) -> int:
    """Weights of the embedding; as many again are in the lm_head."""
    return shape.vocabulary * shape.hidden_size


def tokens_of(entry: Mapping[str, Any]) -> int:
    """Tokens of a corpus entry; ``WHOLE_CORPUS`` where it takes all there are."""
    return entry["windows"] * entry["window"] if "windows" in entry else WHOLE_CORPUS


class Estimate:
    """Costs of all steps of a plan."""

    def __init__(self, plan: Plan):
        self.plan, self.config = plan, plan.config
        self.steps = plan.all_steps()

    def jobs(self) -> dict[str, int]:
        """Rule -> number of jobs, those of the reports left out."""
        return {rule: len(steps) for rule, steps in self.steps.items() if steps}

    def hours(self, machine: Machine) -> dict[str, float]:
        """Rule -> hours of wall time on ``machine``."""
        found = {}
        for rule, steps in self.steps.items():
            if steps:
                found[rule] = sum(self.seconds(step, machine) for step in steps) / machine.jobs / 3600
        return found

    def work(self, step: Step) -> Iterator[tuple[str, float]]:
        """(rate of a machine, operations) of one job."""
        return {"calibrate_model": self._calibration, "fit_transform": self._training, "quantize_model": self._quantization,
                "train_model": self._finish, "evaluate_reference": self._forward, "evaluate_perplexity": self._perplexity,
                "evaluate_tasks": self._tasks, "measure_depth": self._depth}.get(step.rule, lambda step: iter(()))(step)

    def minutes(self, step: Step, machine: Machine) -> int:
        """Minutes of wall time after which one job counts as stuck on ``machine``."""
        return round(min(max(PATIENCE * self.seconds(step, machine) / 60, SHORTEST), LONGEST_JOB))

    def seconds(self, step: Step, machine: Machine) -> float:
        """Wall time of one job on ``machine`` with nothing beside it."""
        return machine.start + sum(operations / getattr(machine, rate) for rate, operations in self.work(step))

    def _shape(self, step: Step) -> ModelShape:
        return grid.shape(self.config, step.wildcards["model"])

    def _calibrated_on(self, axis: str, name: str) -> Mapping[str, Any]:
        """The corpus entry that a transform or mitigation is calibrated on."""
        entry = grid.entry(self.config, axis, name)
        return self.config["corpora"][self.config["calibrations"][entry.get("calibration", "default")]["corpus"]]

    def _calibration(self, step: Step) -> Iterator[tuple[str, float]]:
        tokens, shape = tokens_of(self.config["corpora"][self.config["calibrations"][step.wildcards["calibration"]]["corpus"]]), self._shape(step)
        yield "products", 2 * weights_of(shape) * tokens
        yield "solver", 2 * tokens * shape.layers * layer_moments(shape)

    def _training(self, step: Step) -> Iterator[tuple[str, float]]:
        options = step.spec["transform"]["options"]
        if "batch_size" in options:
            yield self._trained("transforms", step, options)

    def _finish(self, step: Step) -> Iterator[tuple[str, float]]:
        yield from self._quantization(step)
        yield self._trained("mitigations", step, step.spec["mitigation"]["options"])

    def _trained(self, axis: str, step: Step, options: Mapping[str, Any]) -> tuple[str, float]:
        """All steps of a training, end to end or layer by layer, on batches of the windows of calibration."""
        window = self._calibrated_on(axis, step.wildcards[grid.AXES[axis]])["window"]
        return "products", 6 * weights_of(self._shape(step)) * options["steps"] * options["batch_size"] * window

    def _quantization(self, step: Step) -> Iterator[tuple[str, float]]:
        shape, method = self._shape(step), step.spec["mitigation"]["method"]
        base = step.spec["mitigation"]["options"].get("base", method)
        for m, n in (shape.linear_size(linear) for linear in LINEARS):
            yield "solver", shape.layers * 10 * m * n  # folding, measuring, packing
            if any(name in method or name in base for name in SOLVED):
                yield "solver", shape.layers * (2 * m * n * n + n**3)
            if any(name in method for name in DECOMPOSED):
                yield "solver", shape.layers * 20 * m * n * min(m, n)
        if "propagation" in step.spec:
            tokens = tokens_of(self._calibrated_on("mitigations", step.wildcards["mitigation"]))
            yield "products", 5 * 2 * weights_of(shape) * tokens
            yield "solver", 2 * tokens * shape.layers * layer_moments(shape)

    def _forward(self, step: Step) -> Iterator[tuple[str, float]]:
        yield "products", 2 * weights_of(self._shape(step)) * tokens_of(self.config["corpora"][step.wildcards["corpus"]])

    def _perplexity(self, step: Step) -> Iterator[tuple[str, float]]:
        yield from self._forward(step)
        yield "products", 4 * ends_of(self._shape(step)) * tokens_of(self.config["corpora"][step.wildcards["corpus"]])  # two heads

    def _tasks(self, step: Step) -> Iterator[tuple[str, float]]:
        thousands = sum(ITEM * entry["items"] if "items" in entry else TASK_TOKENS.get(entry.get("task", ""), OTHER_TASK)
                        for entry in step.spec["tasks"].values())
        yield "requests", thousands
        yield "products", 2 * (weights_of(self._shape(step)) + ends_of(self._shape(step))) * 1000 * thousands

    def _depth(self, step: Step) -> Iterator[tuple[str, float]]:
        tokens = step.spec["windows"] * self.config["corpora"][step.wildcards["corpus"]]["window"]
        yield "products", 3 * 2 * weights_of(self._shape(step)) * tokens

    def disk(self) -> dict[str, float]:
        """What lies on disk -> bytes: models, calibration statistics (float32 second moments), references, checkpoints that exist at a time."""
        found = {"models": 0.0, "calibration": 0.0, "references": 0.0}
        for step in self.steps["fetch_model"]:
            found["models"] += 2 * (weights_of(self._shape(step)) + 2 * ends_of(self._shape(step)))
        for step in self.steps["calibrate_model"]:
            shape = self._shape(step)
            found["calibration"] += 4 * shape.layers * layer_moments(shape)
        for step in self.steps["evaluate_reference"]:
            found["references"] += 2 * self._shape(step).hidden_size * tokens_of(self.config["corpora"][step.wildcards["corpus"]])
        made = [*self.steps["quantize_model"], *self.steps["train_model"]]
        sizes = sorted(0.6 * weights_of(self._shape(step)) + 4 * ends_of(self._shape(step)) for step in made)
        kept = sizes if self.config["keep_checkpoints"] else sizes[-SIDE_BY_SIDE:]
        return {**found, "checkpoints": float(sum(kept))}


def text(plan: Plan) -> str:
    """The estimate for readers: cells, jobs, hours by machine and rule, disk."""
    estimate = Estimate(plan)
    jobs, disk = estimate.jobs(), estimate.disk()
    counts = {"models": len(plan.config["models"]), "studies": len(plan.studies), "cells": len(plan.cells),
              "jobs before the reports": sum(jobs.values())}
    lines = [", ".join(f"{count} {name}" for name, count in counts.items())]
    for machine in (GPU, CPU):
        hours = estimate.hours(machine)
        total = sum(hours.values())
        if total > LONGEST:
            continue
        unit, factor, digits, least = ("hours", 1, 1, 0.05) if total >= 1 else ("minutes", 60, 0, 0.5)
        parts = ", ".join(f"{rule} {factor * value:.{digits}f}" for rule, value in sorted(hours.items(), key=lambda pair: -pair[1])
                          if factor * value >= least)
        lines.append(f"about {factor * total:.{digits}f} {unit} on {machine.name} ({parts})")
    lines.append(f"about {sum(disk.values()) / 1e9:.1f} GB of disk ({', '.join(f'{name} {size / 1e9:.1f}' for name, size in disk.items())})")
    return "\n".join([*lines, "from stated costs (scripts/quantgrid/estimates.py), a factor of two either way"])
