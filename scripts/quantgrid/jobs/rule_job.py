"""The job of a rule: header, verified inputs, the script of the rule, recorded outputs, footer."""

from __future__ import annotations

import json
import os
import platform
import runpy
import sys
import time
from collections.abc import Collection
from pathlib import Path

from ..ground.errors import ConfigError, shortened
from ..ground.places import SCRIPTS
from ..ground.storage import put_off, verified, write_text
from ..machine.gpus import choose
from ..machine.memory import less_memory
from ..machine.usage import COLD, WARM, Usage, begin, usage
from ..plan.steps import OUTPUTS, REPORTS
from . import fork_server
from .integrity import verify, write_record
from .progress import FAILED_RESULT
from .shared_cache import CACHED_RULES, detach

# `first`: first file of a list that the script itself verifies
NO_OUTPUTS_OF_STEPS = ("spec", "statements", "first", "costs")
OURS = ("verify", "costs")  # options that the script of a rule does not get


def head(rule: str, spec: dict) -> str:
    """Format the header, two lines: the rule with its axes, study or model; then seed, compute,
    versions and machine."""
    axes = spec.get("axes") or {name: spec[name] for name in ("study", "model") if name in spec}
    names = sorted(axes, key=lambda name: (name == "key", name != "model"))
    seed = [f"seed {spec['seed']}"] if "seed" in spec else []
    compute = [f"{name} {value}" for name, value in spec.get("compute", {}).items()]
    versions = [
        f"{name} {version}"
        for name, version in {**spec.get("versions", {}), "python": platform.python_version()}.items()
    ]
    return (
        f"{rule}: {', '.join(f'{name} {axes[name]}' for name in names) or 'all'}\n"
        f"{', '.join([*seed, *compute, *versions])}, on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    )


def foot(used: Usage) -> str:
    """Format the footer: seconds, peak memory, and peak GPU memory if torch used a GPU."""
    said = f"{used.seconds:.1f} s, peak memory {used.peak_mb:.0f} MiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        said += f", of the GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return said


def failure(results: list[str]) -> str:
    """Return the reason of a numerical failure recorded in one of the job's JSON outputs; empty if
    there is none."""
    for path in results:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.get("status") == "failed":
            return content["reason"]
        if reasons := [
            found["reason"] for found in content.get("tasks", {}).values() if found.get("status") == "failed"
        ]:
            return "; ".join(reasons)
    return ""


def named(words: list[str]) -> dict[str, list[str]]:
    """Parse the arguments of a job: ``--name`` and the words that follow it."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word[2:], [])
        elif word:
            values.append(word)
    return found


def passed_on(words: list[str]) -> list[str]:
    """List the arguments of a job that its script reads: all options but ``OURS``."""
    kept, ours = [], False
    for word in words:
        if word.startswith("--"):
            ours = word[2:] in OURS
        if not ours:
            kept.append(word)
    return kept


def verify_inputs(given: dict[str, list[str]], outputs: Collection[str], threads: int) -> None:
    """Verify all input files of a job and log the time taken; model weights are verified when they
    are read."""
    begin = time.monotonic()
    verified.clear()
    put_off.clear()
    for path in (
        path
        for name, paths in given.items()
        if name not in outputs and name not in NO_OUTPUTS_OF_STEPS
        for path in paths
    ):
        verify(path, threads, weights_later=True)
    read = sum(os.path.getsize(file) for file in verified)
    print(
        f"verified {len(verified)} files, {read / 2**20:.0f} MiB, in {time.monotonic() - begin:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def compute(rule: str, words: list[str], spec: dict) -> None:
    """Verify the inputs of a job, run its script, record its outputs."""
    given, threads = named(words), spec.get("compute", {}).get("threads", 1)
    outputs = {**OUTPUTS, **REPORTS}.get(rule, {})
    verify_inputs(given, outputs, threads)
    if spec.get("compute", {}).get("device") in ("auto", "cuda"):
        choose()
    sys.argv = [str(SCRIPTS / f"{rule}.py"), *passed_on(words)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    made = [path for name in outputs for path in given.get(name, []) if os.path.exists(path)]
    if reason := failure([path for path in made if path.endswith(".json")]):
        print(f"{FAILED_RESULT}{reason}", file=sys.stderr)
    if os.environ.get("SNAKEMAKE_OUTPUT_CACHE") and rule in CACHED_RULES:
        detach(made)
    write_record(rule, made, threads)


def one_line(error: BaseException, rule: str, spec: dict) -> str:
    """Message of an error that the user can mend: invalid input, or a GPU with too little memory; else empty."""
    if isinstance(error, ConfigError):
        return str(error)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return ""
    learned = spec.get("transform", {}).get("learned")
    kind = "propagate_model" if "propagation" in spec else "learn_transform" if learned else rule
    said = shortened(str(error).removeprefix("CUDA out of memory. "))
    return f"the GPU has too little memory ({said}): {less_memory(kind)}"


def main() -> None:
    """Run the job of the command line: a rule, ``--spec`` and the files of the job."""
    rule, *words = sys.argv[1:]
    begun, start = begin(), WARM if fork_server.in_fork() else COLD
    spec = json.loads(words[words.index("--spec") + 1])
    print(head(rule, spec), file=sys.stderr, flush=True)
    try:
        compute(rule, words, spec)
    except BaseException as error:
        print(f"failed after {foot(usage(begun, start))}", file=sys.stderr)
        said = one_line(error, rule, spec)
        raise (SystemExit(f"{rule}: {said}") if said else error) from None
    used = usage(begun, start)
    for path in named(words).get("costs", ()):
        write_text(path, used.table())
    print(f"done in {foot(used)}", file=sys.stderr)
