"""Look-ups of the workflow's rules in a plan: patterns of paths, inputs, specifications, memory and threads of jobs. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import demands, grid
from .provenance import canonical
from .resources import memory_mb
from .steps import DIGESTS, OPTIONAL_INPUTS, Step, outputs_of


class RuleLookUps:
    """Base of ``pipeline.Plan``, which has the ``config``, the path of the ``results`` and the ``steps`` by rule and wildcards."""

    config: Mapping[str, Any]
    results: str
    steps: dict[str, dict[frozenset, Step]]
    records: dict[str, str]

    def pattern(self, rule: str, output: str) -> str:
        """Output path of a rule with its wildcards, as a rule declares it."""
        return f"{self.results}/{outputs_of(rule)[output]}"

    def digest(self, rule: str) -> str:
        """Path, with its wildcards, of the record of what a job of a rule wrote."""
        return f"{self.results}/{DIGESTS[rule]}"

    def digests(self, paths: Iterable[str]) -> list[str]:
        """The records of the content of outputs of steps."""
        return list(dict.fromkeys(self.records[path] for path in paths))

    def inputs(self, rule: str) -> Callable[[Any], Mapping[str, Any]]:
        """Input function of a rule: wildcards -> named paths, ``digests`` among them; an input that this step does without is an empty list."""
        without = {name: [] for name in OPTIONAL_INPUTS.get(rule, ())}

        def named(wildcards: Any) -> Mapping[str, Any]:
            step = self.steps[rule][frozenset(wildcards.items())]
            return {**without, **step.inputs, "digests": step.digests}

        return named

    def spec(self, rule: str) -> Callable[[Any], str]:
        """Function of a rule's wildcards that gives the job's specification as canonical JSON."""
        return lambda wildcards: canonical(self.steps[rule][frozenset(wildcards.items())].spec)

    def memory_mb(self, rule: str) -> Callable[..., int]:
        """Function of a rule's wildcards and the attempt that gives the job's memory in MiB."""
        size = demands.size(self.config, rule)
        return lambda wildcards, attempt: attempt * memory_mb(demands.kind(self.config, rule, wildcards), grid.shape(self.config, wildcards.model),
                                                              **size)

    def threads(self, rule: str) -> int:
        threads = self.config["threads"]
        return threads.get(rule, threads["default"])
