"""Look-ups of the workflow's rules in a plan: path patterns, inputs, specifications, parameters,
memory and threads of jobs. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import signature
from typing import Any

from ..config import entries
from ..ground.provenance import canonical
from ..machine.memory import memory_mb
from . import workload
from .steps import DIGESTS, GATHERED, OPTIONAL_INPUTS, Step, job_pattern, outputs_of


def signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Store the signature of a function of a rule on it: Snakemake asks for it several times per job,
    and to read it off the code takes longer than most of these functions."""
    function.__signature__ = signature(function)  # type: ignore[attr-defined]
    return function


class RuleLookUps:
    """Base of ``pipeline.Plan``; expects ``config``, the path of the ``results``, and the ``steps``
    by rule and wildcards."""

    config: Mapping[str, Any]
    results: str
    steps: dict[str, dict[frozenset, Step]]
    records: dict[str, str]

    def pattern(self, rule: str, output: str) -> str:
        """Return the output path of a rule with its wildcards, as the rule declares it."""
        return f"{self.results}/{outputs_of(rule)[output]}"

    def digest(self, rule: str) -> str:
        """Return the path, with wildcards, of the record that a job of a rule writes."""
        return f"{self.results}/{DIGESTS[rule]}"

    def logs(self, rule: str) -> dict[str, str]:
        """Map what a job leaves about itself to its path, with wildcards: the ``text`` of its log, and its
        ``costs``, time and memory (:mod:`..machine.usage`)."""
        return {
            "text": f"{self.results}/logs/{job_pattern(rule).removesuffix('/all')}.log",
            "costs": f"{self.results}/benchmarks/{job_pattern(rule)}.tsv",
        }

    def digests(self, paths: Iterable[str]) -> list[str]:
        """List the content records of outputs of steps."""
        return list(dict.fromkeys(self.records[path] for path in paths))

    def inputs(self, rule: str) -> Callable[[Any], Mapping[str, Any]]:
        """Input function of a rule: wildcards -> named paths, with ``digests`` among them; an input
        that a step does not use is an empty list, and the inputs of a rule in ``GATHERED`` are one
        list."""
        without: dict[str, list[str]] = {name: [] for name in OPTIONAL_INPUTS.get(rule, ())}

        @signed
        def named(wildcards: Any) -> Mapping[str, Any]:
            step = self.steps[rule][frozenset(wildcards.items())]
            inputs = {GATHERED[rule]: list(step.inputs.values())} if rule in GATHERED else step.inputs
            return {**without, **inputs, "digests": step.digests}

        return named

    def spec(self, rule: str) -> Callable[[Any], str]:
        """Parameter function of a rule: wildcards -> the job's specification as canonical JSON."""
        return signed(lambda wildcards: canonical(self.steps[rule][frozenset(wildcards.items())].spec))

    def parameter(self, rule: str, name: str) -> Callable[[Any], Any]:
        """Parameter function of a rule: wildcards -> one entry of the job's specification, for
        readers; a mapping as canonical JSON."""

        @signed
        def value(wildcards: Any) -> Any:
            found = self.steps[rule][frozenset(wildcards.items())].spec[name]
            return canonical(found) if isinstance(found, Mapping) else found

        return value

    def memory_mb(self, rule: str) -> Callable[..., int]:
        """Resource function of a rule: wildcards and attempt -> the job's memory in MiB."""
        size = workload.size(self.config, rule)

        @cache
        def needed(kind: str, model: str) -> int:
            return memory_mb(kind, entries.shape(self.config, model), **size)

        return signed(
            lambda wildcards, attempt: attempt * needed(workload.kind(self.config, rule, wildcards), wildcards.model)
        )

    def threads(self, rule: str) -> int:
        threads = self.config["threads"]
        return threads.get(rule, threads["default"])
