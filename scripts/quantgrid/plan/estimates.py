"""Estimates of a run in advance: cells, jobs, hours and disk, from the shapes of the models and
stated costs. Standard library only.

Hours are floating-point operations over the rates of :class:`Machine`, plus a fixed time per job.
They distinguish a day from a month; expect errors of a factor of two either way. Operations
counted: 2 per weight and token of a forward pass, 6 of a training step, 2 n^2 per token of a second
moment, 2 m n^2 + n^3 of GPTQ, 20 m n min(m, n) of a singular value decomposition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..config import entries, registry
from ..config.cells import AXES
from ..machine.chunks import AUTO, batch_tokens
from ..models.counts import active_weights, all_weights, layer_moments
from ..models.shapes import ModelShape
from .pipeline import Plan
from .steps import REPORTS, Step

WHOLE_CORPUS = 300_000  # tokens: WikiText-2 test has 250,000 to 340,000, depending on the tokenizer
# Tokens of all requests of a task, in thousands: documents x choices x tokens per request, rounded
# from the sizes of the data sets. Choices that share their context are computed with less.
TASK_TOKENS = {
    "mmlu": 6700,
    "mathqa": 1000,
    "arc_challenge": 190,
    "arc_easy": 380,
    "hellaswag": 4000,
    "winogrande": 80,
    "boolq": 1000,
    "lambada_openai": 460,
    "piqa": 180,
    "sst2": 50,
    "openbookqa": 40,
    "social_iqa": 230,
}
OTHER_TASK = 50  # thousand tokens of a task not listed above
ITEM = 0.24  # thousand tokens of the requests per item of a builtin task
REQUEST = 100  # tokens of a short request
REPORT = 4.0  # seconds of a job of the reports, most of them imports; measured in the smoke run
LIGHT_REPORTS = ("check_baseline", "collect_results", "compare_study", "tabulate_study")  # draw nothing
REPORT_SECONDS = {"plot_distributions": 20.0, **dict.fromkeys(LIGHT_REPORTS, 1.5)}
PER_CELL = {"build_report": 0.15}  # seconds of a report for each cell that it shows, measured in the smoke run
LONGEST = 2000  # hours beyond which a machine is not worth mentioning
SIDE_BY_SIDE = 2  # packed checkpoints on disk at a time, unless all are kept
# Timeout of a job in minutes: PATIENCE x its estimate, clamped to [SHORTEST, LONGEST_JOB].
PATIENCE, SHORTEST, LONGEST_JOB = 6, 60, 24 * 60
RACED = 0.17  # share of the windows of a race of dense candidates (tests/unit/evaluation/test_races.py)
INSTANT = {"merge_shards": 0.5, "decide_race": 0.5}  # seconds of jobs of the driver without torch
FURTHER = {"train_mitigation": 4.0}  # start-up seconds beside a machine's: the model is loaded, folded and solved


@dataclass(frozen=True)
class Machine:
    """Rates of a machine. ``products``: FLOP/s of large matrix products in the dtype of the model;
    ``solver``: FLOP/s of float32 factorizations and moments; ``requests``: limit of short task
    requests by launch overhead, in thousand tokens per second, one request at a time; ``start``:
    start-up seconds per job; ``jobs``: number of parallel jobs."""

    name: str
    products: float
    solver: float
    requests: float
    start: float
    jobs: int


# Assumed for a GPU: about 30 % of the bfloat16 peak of an A100, 30 ms for a request of 100 tokens;
# its memory is not checked. Measured for the CPU with SmolLM2-135M on two cores of an AMD EPYC
# (AVX2, float32, one thread per job): an evaluation of 3072 tokens takes 28 s, a quantization 25 s;
# a job with a warm start begins in 0.2 to 0.9 s (`make bench BENCH=jobs`), a cold one in 1 to 5 s.
GPU, CPU = Machine("one A100-class GPU", 1e14, 1e13, 3.3, 30.0, 1), Machine("2 CPU cores", 7e10, 4e10, 3.3, 1.0, 2)


def weights_of(shape: ModelShape) -> int:
    """Count the weights of all linears of the decoder layers."""
    return all_weights(shape)


def ends_of(shape: ModelShape) -> int:
    """Count the weights of the embedding; the lm_head has the same number."""
    return shape.vocabulary * shape.hidden_size


def tokens_of(entry: Mapping[str, Any]) -> int:
    """Count the tokens of a corpus entry; ``WHOLE_CORPUS`` if it takes the complete corpus."""
    return entry["windows"] * entry["window"] if "windows" in entry else WHOLE_CORPUS


@cache
def _sizes(shape: ModelShape) -> Counter[tuple[int, int]]:
    """Count the linears of a model by their size (m, n)."""
    return Counter(shape.linear_size(linear) for plan, count in shape.plans() for linear in plan.linears * count)


class Estimate:
    """Costs of all steps of a plan."""

    def __init__(self, plan: Plan):
        self.plan, self.config = plan, plan.config
        self.steps = plan.all_steps()

    def jobs(self) -> dict[str, int]:
        """Map each rule to its number of jobs, without the rules of the reports."""
        return {rule: len(steps) for rule, steps in self.steps.items() if steps}

    def hours(self, machine: Machine) -> dict[str, float]:
        """Map each rule to its hours of wall time on ``machine``."""
        found = {}
        for rule, steps in self.steps.items():
            if steps:
                found[rule] = sum(self.seconds(step, machine) for step in steps) / machine.jobs / 3600
        return found

    def work(self, step: Step) -> Iterator[tuple[str, float]]:
        """Compute (rate of a machine, operations) of one job."""
        return {
            "calibrate_model": self._calibration,
            "measure_sensitivity": self._sensitivities,
            "fit_transform": self._training,
            "measure_schemes": self._solving,
            "quantize_model": self._quantization,
            "train_mitigation": self._trained_mitigation,
            "evaluate_reference": self._forward,
            "evaluate_perplexity": self._perplexity,
            "screen_cell": self._first_look,
            "evaluate_tasks": self._tasks,
            "measure_residual_error": self._residual_error,
            "export_model": self._export,
        }.get(step.rule, lambda step: iter(()))(step)

    def minutes(self, step: Step, machine: Machine) -> int:
        """Compute the timeout of one job on ``machine`` in minutes of wall time."""
        return round(min(max(PATIENCE * self.seconds(step, machine) / 60, SHORTEST), LONGEST_JOB))

    def seconds(self, step: Step, machine: Machine) -> float:
        """Compute the wall time of one job alone on ``machine``, in seconds."""
        start = INSTANT.get(step.rule, machine.start + FURTHER.get(step.rule, 0.0))
        return start + sum(operations / getattr(machine, rate) for rate, operations in self.work(step))

    def seconds_of(self, rule: str, wildcards: Mapping[str, str], machine: Machine) -> float:
        """Compute the wall time of any job of a run in seconds: a step, a job of the reports, or a target
        (0)."""
        if rule in self.plan.steps:
            return self.seconds(self.plan.steps[rule][frozenset(wildcards.items())], machine)
        shown = PER_CELL.get(rule, 0.0) * len(self.plan.cells)
        return REPORT_SECONDS.get(rule, REPORT) + shown if rule in REPORTS else 0.0

    def _shape(self, step: Step) -> ModelShape:
        return entries.shape(self.config, step.wildcards["model"])

    def _calibrated_on(self, axis: str, name: str) -> Mapping[str, Any]:
        """Return the corpus entry on which a transform or mitigation is calibrated."""
        entry = entries.entry(self.config, axis, name)
        return self.config["corpora"][self.config["calibrations"][entry.get("calibration", "default")]["corpus"]]

    def _calibration(self, step: Step) -> Iterator[tuple[str, float]]:
        tokens, shape = (
            tokens_of(self.config["corpora"][self.config["calibrations"][step.wildcards["calibration"]]["corpus"]]),
            self._shape(step),
        )
        yield "products", 2 * active_weights(shape) * tokens
        yield "solver", 2 * tokens * shape.layers * layer_moments(shape)

    def _sensitivities(self, step: Step) -> Iterator[tuple[str, float]]:
        """Count two forward passes and one backward pass to the inputs, on some of the calibration windows."""
        entry = self.config["corpora"][self.config["calibrations"][step.wildcards["calibration"]]["corpus"]]
        tokens = min(tokens_of(entry), step.spec["windows"] * entry["window"])
        yield "products", 2 * (3 * active_weights(self._shape(step)) + 2 * ends_of(self._shape(step))) * tokens

    def _solving(self, step: Step) -> Iterator[tuple[str, float]]:
        for rate, operations in self._quantization(step):
            yield rate, operations * len(step.spec["schemes"]["candidates"])

    def _training(self, step: Step) -> Iterator[tuple[str, float]]:
        options = step.spec["transform"]["options"]
        if "batch_size" in options:
            yield self._trained("transforms", step, options)

    def _trained_mitigation(self, step: Step) -> Iterator[tuple[str, float]]:
        yield from self._quantization(step)
        yield self._trained("mitigations", step, step.spec["mitigation"]["options"])

    def _trained(self, axis: str, step: Step, options: Mapping[str, Any]) -> tuple[str, float]:
        """Count the operations of all steps of a training, end to end or layer by layer, on batches
        of the calibration windows."""
        window = self._calibrated_on(axis, step.wildcards[AXES[axis]])["window"]
        return "products", 6 * weights_of(self._shape(step)) * options["steps"] * options["batch_size"] * window

    def _quantization(self, step: Step) -> Iterator[tuple[str, float]]:
        shape, method = self._shape(step), step.spec["mitigation"]["method"]
        costs = registry.costs(method, step.spec["mitigation"]["options"])
        for (m, n), count in _sizes(shape).items():
            yield "solver", count * 10 * m * n  # fold, measure, pack
            if "solve" in costs:
                yield "solver", count * (2 * m * n * n + n**3)
            if "decompose" in costs:
                yield "solver", count * 20 * m * n * min(m, n)
        if "propagation" in step.spec:
            tokens = tokens_of(self._calibrated_on("mitigations", step.wildcards["mitigation"]))
            yield "products", 5 * 2 * active_weights(shape) * tokens
            yield "solver", 2 * tokens * shape.layers * layer_moments(shape)

    def _forward(self, step: Step) -> Iterator[tuple[str, float]]:
        yield "products", 2 * active_weights(self._shape(step)) * self._tokens(step)

    def _perplexity(self, step: Step) -> Iterator[tuple[str, float]]:
        yield from self._forward(step)
        # the lm_head twice, quantized and full-precision
        yield "products", 4 * ends_of(self._shape(step)) * self._tokens(step)

    def _first_look(self, step: Step) -> Iterator[tuple[str, float]]:
        for rule in ("quantize_model", "evaluate_perplexity"):
            yield from self.work(replace(step, rule=rule, spec=step.spec[rule]))

    def _tokens(self, step: Step) -> int:
        """Count the tokens of the shard of an evaluation."""
        entry, shard = self.config["corpora"][step.wildcards["corpus"]], step.spec["shard"]
        return tokens_of(entry) if shard["stop"] is None else (shard["stop"] - shard["start"]) * entry["window"]

    def _tasks(self, step: Step) -> Iterator[tuple[str, float]]:
        thousands = sum(
            ITEM * entry["items"] if "items" in entry else TASK_TOKENS.get(entry.get("task", ""), OTHER_TASK)
            for entry in step.spec["tasks"].values()
        )
        yield "requests", thousands / self._contexts(step)
        yield "products", 2 * (active_weights(self._shape(step)) + ends_of(self._shape(step))) * 1000 * thousands

    def _contexts(self, step: Step) -> float:
        """Return the contexts of tasks in one forward pass."""
        given = step.spec["evaluation"]["batch_size"]
        device = step.spec["compute"]["device"]
        return batch_tokens("cpu" if device == "cpu" else "cuda") / REQUEST if given == AUTO else given

    def _residual_error(self, step: Step) -> Iterator[tuple[str, float]]:
        tokens = step.spec["windows"] * self.config["corpora"][step.wildcards["corpus"]]["window"]
        yield "products", 3 * 2 * active_weights(self._shape(step)) * tokens

    def _export(self, step: Step) -> Iterator[tuple[str, float]]:
        """Count the operations of packing, and of the check: the cell and the export on its windows."""
        shape, tokens = self._shape(step), tokens_of(self.config["corpora"][step.spec["about"]["corpus"]])
        yield "solver", 10 * weights_of(shape)
        yield "products", 2 * 2 * (active_weights(shape) + ends_of(shape)) * tokens

    def disk(self) -> dict[str, float]:
        """Map each kind of file to its bytes on disk: models, calibration statistics (float32
        second moments), references, checkpoints that exist at a time."""
        found = {"models": 0.0, "calibration": 0.0, "references": 0.0}
        for step in self.steps["fetch_model"]:
            found["models"] += 2 * (weights_of(self._shape(step)) + 2 * ends_of(self._shape(step)))
        for step in self.steps["calibrate_model"]:
            shape = self._shape(step)
            found["calibration"] += 4 * shape.layers * layer_moments(shape)
        for step in self.steps["evaluate_reference"]:
            found["references"] += 2 * self._shape(step).hidden_size * self._tokens(step)
        made = [*self.steps["quantize_model"], *self.steps["train_mitigation"]]
        sizes = sorted(0.6 * weights_of(self._shape(step)) + 4 * ends_of(self._shape(step)) for step in made)
        kept = sizes if self.config["keep_checkpoints"] else sizes[-SIDE_BY_SIDE:]
        return {**found, "checkpoints": float(sum(kept))}


def text(plan: Plan) -> str:
    """Format the estimate: cells, jobs, hours by machine and rule, disk."""
    estimate = Estimate(plan)
    jobs, disk = estimate.jobs(), estimate.disk()
    counts = {
        "models": len(plan.config["models"]),
        "studies": len(plan.studies),
        "cells": len(plan.cells),
        "jobs before the reports": sum(jobs.values()),
    }
    lines = [", ".join(f"{count} {name}" for name, count in counts.items())]
    for machine in (GPU, CPU):
        hours = estimate.hours(machine)
        total = sum(hours.values())
        if total > LONGEST:
            continue
        unit, factor, digits, least = ("hours", 1, 1, 0.05) if total >= 1 else ("minutes", 60, 0, 0.5)
        parts = ", ".join(
            f"{rule} {factor * value:.{digits}f}"
            for rule, value in sorted(hours.items(), key=lambda pair: -pair[1])
            if factor * value >= least
        )
        lines.append(f"about {factor * total:.{digits}f} {unit} on {machine.name} ({parts})")
    lines.append(
        f"about {sum(disk.values()) / 1e9:.1f} GB of disk "
        f"({', '.join(f'{name} {size / 1e9:.1f}' for name, size in disk.items())})"
    )
    if plan.raced:
        lines.append(
            "races count as if every candidate took all looks and were evaluated by its study; simulated ones used "
            f"{RACED:.0%} of their windows"
        )
    return "\n".join([*lines, "from stated costs (docs/explanation/performance.md), a factor of two either way"])
