"""Rules against the plan: outputs, logs, benchmarks, docstrings, arguments of scripts; and what the
workflow asks of Snakemake's internals."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantgrid.ground.places import ROOT
from quantgrid.jobs.job import CELL_INPUTS
from quantgrid.plan.steps import DIGESTS, OUTPUTS, REPORTS, outputs_of

SNAKEMAKE = "9.27.1"  # the version that workflow/rules/internals.smk was seen on
RESULTS = "results-smoke"
RULES = (*OUTPUTS, *REPORTS)
TARGETS = ("all", "evaluations", "exports", "tables", "figures")
# A workflow that has all rules of the smoke config and prints them as JSON.
PRINTER = f"""
import json

include: {str(ROOT / "Snakefile")!r}

def described(name):
    found = getattr(rules, name)
    outputs = {{output: path if isinstance(path, str) else list(path) for output, path in found.output.items()}}
    return {{"outputs": outputs, "log": dict(found.log.items()), "command": workflow.get_rule(name).shellcmd, "figures": FIGURES}}

internals = {{"is_driver": is_driver(), "is_module": is_module(), "is_dry_run": is_dry_run(), "config_files": list(map(str, config_files())),
              "uses_object_storage": uses_object_storage(), "asks_for_gpu": [asks_for_gpu(rule) for rule in ("quantize_model", "fit_transform")],
              "checkout": os.path.normpath(os.path.join(SCRIPTS, ".."))}}
print("FOUND " + json.dumps({{"rules": {{name: described(name) for name in {RULES!r}}}, "internals": internals}}))
"""  # noqa: E501


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output of `snakemake --list`, after one line of JSON on the rules and the internals."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "Snakefile").write_text(PRINTER)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--list",
            "--snakefile",
            folder / "Snakefile",
            "--configfile",
            "config/smoke.yaml",
            "--set-resources",
            "quantize_model:gpu=1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(listed: str) -> dict[str, Any]:
    return json.loads(next(line for line in listed.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND "))


def test_every_rule_has_a_docstring_that_the_list_shows(listed: str):
    said = dict(re.findall(r"^(\w+) \((.+)\)$", listed, re.MULTILINE))
    assert said.keys() == {*RULES, *TARGETS}
    assert all(text[0].isupper() and text.endswith(".") for text in said.values())


@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_logs_are_those_of_the_plan(rule: str, found: dict[str, Any]):
    known = found["rules"][rule]
    expected = {name: f"{RESULTS}/{pattern}" for name, pattern in outputs_of(rule).items()}
    if rule == "plot_distributions":
        expected = {
            name: [pattern.replace("{figure}", figure) for figure in known["figures"]]
            for name, pattern in expected.items()
        }
    assert known["outputs"] == {**expected, "digest": f"{RESULTS}/{DIGESTS[rule]}"}
    places = {"logs": ".log", "benchmarks": ".tsv"}
    text, costs = (
        f"{RESULTS}/{DIGESTS[rule]}".replace("/digests/", f"/{folder}/").removesuffix(".json") + suffix
        for folder, suffix in places.items()
    )
    assert known["log"] == {"text": text.replace("/all.log", ".log"), "costs": costs}


def arguments_of(script: Path) -> set[str]:
    """Names that a script gives to ``job.arguments``."""
    calls = [
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "arguments"
    ]
    given = [argument for call in calls for argument in call.args]
    shared = CELL_INPUTS if any(isinstance(argument, ast.Starred) for argument in given) else ()
    return {*shared, *(argument.value for argument in given if isinstance(argument, ast.Constant))}


@pytest.mark.parametrize("rule", RULES)
def test_the_command_of_a_rule_has_every_argument_of_its_script_and_no_other(rule: str, found: dict[str, Any]):
    lines = [line.strip() for line in found["rules"][rule]["command"].split(" \\\n")]
    options = [line.split()[0].removeprefix("--") for line in lines[1:-1]]
    assert lines[0] == f'python "$QUANTGRID_SCRIPTS/run_job.py" {rule}' and lines[-1] == "> {log.text:q} 2>&1"
    assert options[-2:] == ["costs", "spec"], "the longest comes last, so that the rest can be read"
    assert len(options) == len({*options})
    wanted = arguments_of(ROOT / "scripts" / f"{rule}.py")
    assert {*options} - {"costs", "spec", "verify"} == wanted


# -- Snakemake's internals -------------------------------------------------------------------------


def test_internals_were_seen_on_the_installed_version():
    """After an upgrade: run the tests of the workflow, then name the version here."""
    assert (
        version("snakemake") == SNAKEMAKE
        and f"snakemake=={SNAKEMAKE}\n" in (ROOT / "envs" / "requirements.txt").read_text()
    )
    assert f'min_version("{SNAKEMAKE.rpartition(".")[0]}")' in (ROOT / "Snakefile").read_text()


def test_internals_answer_as_described(found: dict[str, Any]):
    internals = found["internals"]
    assert [Path(path).name for path in internals.pop("config_files")] == ["smoke.yaml"]
    assert internals == {
        "is_driver": True,
        "is_module": False,
        "is_dry_run": False,
        "uses_object_storage": False,
        "asks_for_gpu": [True, False],
        "checkout": str(ROOT),
    }


def test_no_other_file_of_the_workflow_uses_internals():
    """``workflow.cores`` is documented; nothing else is asked of the object elsewhere."""
    files = [
        path
        for path in (ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk"))
        if path.name != "internals.smk"
    ]
    assert len(files) == 10
    for path in files:
        text = path.read_text()
        assert set(re.findall(r"\bworkflow\.(\w+)", text.replace('"workflow/', ""))) <= {"cores"}, path
        assert not re.search(r"\w\._\w", text), path


@pytest.mark.parametrize("asked, kept", [((100, 1), False), ((300, 3), True), (None, True)])
def test_the_default_limit_of_job_starts_becomes_one_timer(asked: tuple[int, int] | None, kept: bool):
    """The rules are plain Python there; another limit than the default stays, and so does none."""
    woken = threading.Semaphore(0)
    limit = SimpleNamespace(max_jobs=asked[0], timespan=asked[1]) if asked else None
    scheduler = SimpleNamespace(job_rate_limiter="limiter", _open_jobs=woken)
    workflow = SimpleNamespace(scheduling_settings=SimpleNamespace(max_jobs_per_timespan=limit), scheduler=scheduler)
    found: dict[str, Any] = {"workflow": workflow}
    exec(compile((ROOT / "workflow" / "rules" / "internals.smk").read_text(), "internals.smk", "exec"), found)
    found["WAKE_SECONDS"] = 0.01
    found["leave_no_timers"]()
    assert scheduler.job_rate_limiter == ("limiter" if kept else None)
    assert [woken.acquire(timeout=0.2 if kept else 60) for _ in range(2)] == [not kept] * 2
