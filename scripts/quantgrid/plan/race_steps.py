"""Races of a config: their candidates and steps. Standard library only.

A race is one study on one model. Each look has a shard of new windows and a decision. All steps of
all looks are known in advance; the decision before a look determines which of its shards are
computed. The key of a decision covers every candidate and every look up to its own. A race that
prunes has one more decision, before its looks: which candidates are quantized at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config import races
from ..config.cells import Cell
from ..ground.provenance import canonical, digest
from ..machine.chunks import windows_per_batch
from . import subconfig
from .gate_steps import GateSteps
from .shards import Shard, shards
from .steps import Step, once

PRUNING = -1  # number of the decision before the first look


@dataclass(frozen=True, eq=False)
class Race:
    """A race: the candidates of a study on one model, and a shard of its corpus for each look.

    ``predictors`` maps candidates (``Cell.path``) that wait for a prediction of their error to the
    one that is quantized for it; empty without pruning.
    """

    study: str
    model: str
    corpus: str
    candidates: tuple[Cell, ...]
    shards: tuple[Shard, ...]
    settings: Mapping[str, Any]
    predictors: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Number of the first decision."""
        return PRUNING if self.predictors else 0

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions of the decisions (``evaluation.races.Conditions``)."""
        return {
            "looks": tuple(shard.stop for shard in self.shards),
            "candidates": len(self.candidates),
            "alpha": self.settings["alpha"],
            "close": self.settings["close"],
            "relative": self.settings["metric"] == "kl_divergence",
        }

    def named(self, names: Iterable[str]) -> list[Cell]:
        """Candidates of these ``names`` (``Cell.path``), in their order."""
        known = {cell.path: cell for cell in self.candidates}
        return [known[name] for name in names]

    def entered(self, end: Mapping[str, Any] | None) -> set[Cell]:
        """Candidates that are quantized, by the decision that ends the race; before it (None) those
        that wait for no prediction."""
        out = self.predictors if end is None else end["pruned"]
        return {cell for cell in self.candidates if cell.path not in out}


class RaceSteps(GateSteps):
    """Cells of a plan, their gates and their races."""

    @cached_property
    def raced(self) -> dict[str, list[Race]]:
        """Map each study with a race to its races, one per model."""
        return {
            name: self._races(name, study["race"]) for name, study in self.config["studies"].items() if "race" in study
        }

    def _races(self, study: str, settings: Mapping[str, Any]) -> list[Race]:
        corpus, cells = settings["windows"], [cell for cell in self.studies[study] if cell.quantized]
        batch = windows_per_batch(self.config["evaluation"]["batch_size"])
        parts = shards(self.windows(corpus), settings["first"], batch)
        of_model = {model: [c for c in cells if c.model == model] for model in dict.fromkeys(c.model for c in cells)}
        predicted = races.predictors(self.config, cells) if "prune" in settings else {}
        return [
            Race(study, model, corpus, tuple(own), tuple(parts), settings, _paths(predicted, own))
            for model, own in of_model.items()
        ]

    def race(self, study: str, model: str) -> Race:
        return next(race for race in self.raced[study] if race.model == model)

    def is_screened(self, cell: Cell) -> bool:
        """Check whether the first look of a candidate quantizes it without keeping its checkpoint;
        survivors are quantized again. Trained ones are not, nor those whose checkpoint is kept."""
        return not (self.config["keep_checkpoints"] or self.trains(cell))

    @once
    def screen_cell(self, cell: Cell, corpus: str, shard: Shard) -> Step:
        """Plan the quantization and the evaluation of a cell on one shard, in one job."""
        quantized, evaluated = self.quantize_model(cell), self.evaluate_perplexity(cell, corpus, shard)
        made = ("checkpoint", "manifest")
        reads = {**quantized.inputs, **{n: path for n, path in evaluated.inputs.items() if n not in (*made, "windows")}}
        reads["evaluated"] = evaluated.inputs["windows"]
        return self._step(
            "screen_cell",
            {step.rule: step.spec for step in (quantized, evaluated)} | {"compute": evaluated.spec["compute"]},
            {name: self.made_by[path] for name, path in reads.items()},
            packages=("torch", "transformers"),
            corpus=corpus,
            shard=str(shard),
            **cell.axes,  # type: ignore[arg-type]
        )

    def look(self, race: Race, cell: Cell, number: int) -> Step:
        """Return the step with the losses of a candidate on the new windows of a look, from 0."""
        screened = number == 0 and self.is_screened(cell)
        return (self.screen_cell if screened else self.evaluate_perplexity)(cell, race.corpus, race.shards[number])

    def measured(self, race: Race, cell: Cell) -> str:
        """Return the path of the errors and bits of a candidate."""
        return (self.look(race, cell, 0) if self.is_screened(cell) else self.quantize_model(cell)).outputs["error"]

    @once
    def decide_race(self, race: Race, number: int) -> Step:
        """Plan the decision of a look, from 0, or of the pruning before it."""
        looks = range(max(number, 0) + 1)
        keys = [[self.look(race, cell, look).key for look in looks] for cell in race.candidates]
        predicted = {"predictors": digest(race.predictors, 16)} if race.predictors else {}
        return self._step(
            "decide_race",
            {"race": {**race.settings, **race.conditions}, "shards": digest(keys, 16), **predicted},
            {},
            packages=("scipy",),
            study=race.study,
            model=race.model,
            look=str(number + 1),
        )

    def decisions(self, race: Race) -> list[Step]:
        """List the decisions of a race: of its pruning, then of all looks."""
        return [self.decide_race(race, number) for number in range(race.first, len(race.shards))]

    def decision_spec(self, wildcards: Any) -> str:
        """Build the specification of a decision as canonical JSON, with the part of the config from
        which the job plans the files that it reads."""
        step, study = self.steps["decide_race"][frozenset(wildcards.items())], wildcards.study
        return canonical({**step.spec, "config": subconfig.of_study(self.config, study, self.studies[study])})

    def decision_inputs(self, wildcards: Any, before: Mapping[str, Any] | None) -> dict[str, list[str]]:
        """Name the inputs of a decision: the one ``before`` it (its JSON; None for the first), the
        shards of those still in the race, up to the first look their errors, and all records.
        Pruning reads the errors of the predictors alone."""
        race, number = self.race(wildcards.study, wildcards.model), int(wildcards.look) - 1
        cells = race.candidates if before is None else race.named(before["survivors"])
        if number == PRUNING:
            cells = race.named(dict.fromkeys(race.predictors.values()))
        found = {
            "previous": [] if before is None else [self.decide_race(race, number - 1).outputs["decision"]],
            "shards": [self.look(race, cell, number).outputs["result"] for cell in cells if number >= 0],
            "errors": [self.measured(race, cell) for cell in cells if number <= 0],
        }
        return {**found, "digests": self.digests(path for paths in found.values() for path in paths)}


def _paths(predicted: Mapping[Cell, Cell], cells: Iterable[Cell]) -> dict[str, str]:
    """Map the paths of ``cells`` that have a predictor to its path."""
    return {cell.path: predicted[cell].path for cell in cells if cell in predicted}
