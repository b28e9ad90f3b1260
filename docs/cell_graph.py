"""The rules between a model and the report for one cell, as a mermaid diagram: part of `make
graph`.

Snakemake lists the rules and what they read (`--rulegraph`) for the smoke config cut down to one
cell. An arrow is left out where a way over other rules exists: nearly all rules read the model, for
example. Below its name stand the outputs of a rule.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quantgrid.plan.steps import outputs_of  # noqa: E402 (the library is in scripts/, not installed)

CELL = {"transforms": ["smoothquant"], "mitigations": ["gptq"], "granularities": ["channel"], "formats": ["int4"]}
EVALUATED = {"perplexity": ["docs"], "residual_error": ["docs"], "tasks": ["cloze"]}


def edges() -> set[tuple[str, str]]:
    """(rule, rule that reads its outputs) of one cell, from Snakemake."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config |= {"studies": {"cell": {"models": list(config["models"]), **CELL, "evaluate": EVALUATED}}, "report": {}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "snakemake",
            f"{config['results_dir']}/report.html",
            "--configfile",
            file.name,
            "--rulegraph",
            "mermaid-js",
        ]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", text))
    return {(names[first], names[second]) for first, second in re.findall(r"(id\d+) --> (id\d+)", text)}


def reachable(start: str, arrows: set[tuple[str, str]]) -> set[str]:
    found, pending = set(), [start]
    while pending:
        rule = pending.pop()
        new = {second for first, second in arrows if first == rule} - found
        found |= new
        pending += new
    return found


def reduced(arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Transitive reduction of the arrows."""
    return sorted(arrow for arrow in arrows if arrow[1] not in reachable(arrow[0], arrows - {arrow}))


def diagram(arrows: list[tuple[str, str]]) -> str:
    rules = sorted({rule for arrow in arrows for rule in arrow})
    nodes = [f'\t{rule}["<b>{rule}</b><br/>{", ".join(outputs_of(rule))}"]' for rule in rules]
    return "\n".join(
        ["```mermaid", "flowchart TB", *nodes, *(f"\t{first} --> {second}" for first, second in arrows), "```"]
    )


if __name__ == "__main__":
    print(diagram(reduced(edges())))
