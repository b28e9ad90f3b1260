"""Run the script of a rule, with a head and a foot to its log: what it is, versions, seed; seconds and peak memory. What every rule calls.

    python scripts/run_job.py quantize_model --spec JSON --model FOLDER ...

A file that comes from a shared cache is checked before, what goes into one is noted after (`quantgrid.shared_cache`). A job that may use a GPU is
given one of its own (`quantgrid.cards`). In a run with a warm start the job is a fork of a process that has its imports (`quantgrid.warm`).
"""

import json
import os
import platform
import resource
import runpy
import sys
import time
from pathlib import Path

from quantgrid import warm
from quantgrid.cards import choose
from quantgrid.errors import ConfigError
from quantgrid.shared_cache import CACHED_RULES, detach, files_of, remember, verify
from quantgrid.tally import FAILED_RESULT

SCRIPTS = Path(__file__).resolve().parent


def head(rule: str, spec: dict) -> str:
    """Two lines: the rule with its axes, study or model, then seed, compute, versions and the machine."""
    axes = spec.get("axes") or {name: spec[name] for name in ("study", "model") if name in spec}
    names = sorted(axes, key=lambda name: (name == "key", name != "model"))
    seed = [f"seed {spec['seed']}"] if "seed" in spec else []
    compute = [f"{name} {value}" for name, value in spec.get("compute", {}).items()]
    versions = [f"{name} {version}" for name, version in {**spec.get("versions", {}), "python": platform.python_version()}.items()]
    return (f"{rule}: {', '.join(f'{name} {axes[name]}' for name in names) or 'all'}\n"
            f"{', '.join([*seed, *compute, *versions])}, on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")


def foot(begin: float) -> str:
    """Seconds since ``begin``, peak memory, and the card's where torch used one."""
    said = f"{time.monotonic() - begin:.1f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        said += f", of the GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return said


def failure(results: list[str]) -> str:
    """Why one of the JSON files that a job wrote is a numerical failure, or nothing: the job itself went well."""
    for path in results:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.get("status") == "failed":
            return content["reason"]
        if reasons := [found["reason"] for found in content.get("tasks", {}).values() if found.get("status") == "failed"]:
            return "; ".join(reasons)
    return ""


def main() -> None:
    rule, *words = sys.argv[1:]
    begin, cache = time.monotonic(), os.environ.get("SNAKEMAKE_OUTPUT_CACHE")
    spec = json.loads(words[words.index("--spec") + 1])
    print(head(rule, spec), file=sys.stderr, flush=True)
    there = [word for word in words if os.path.exists(word)]
    try:
        if cache:
            verify(cache, there)
        if spec.get("compute", {}).get("device") in ("auto", "cuda"):
            choose()
        sys.argv = [str(SCRIPTS / f"{rule}.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        made = [word for word in words if word not in there and os.path.exists(word)]
        if reason := failure([path for path in made if path.endswith(".json")]):
            print(f"{FAILED_RESULT}{reason}", file=sys.stderr)
        if cache and rule in CACHED_RULES:
            detach(files_of(made))
            remember(cache, files_of(made))
    except BaseException as error:
        print(f"failed after {foot(begin)}", file=sys.stderr)
        raise (SystemExit(f"{rule}: {error}") if isinstance(error, ConfigError) else error) from None
    print(f"done in {foot(begin)}", file=sys.stderr)


if __name__ == "__main__":
    if server := warm.connect():
        raise SystemExit(warm.hand_over(server))
    main()
