"""Pins of the environments: conda files name what pip installs, profiles what the plugins know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from checkouts import ROOT

ENVS = ROOT / "envs"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s]+)")


def pins(path: Path) -> dict[str, str]:
    """Package -> version of a requirements file; every line that is not a comment, blank or another
    file has to be an exact pin."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    found = [PIN.fullmatch(line) for line in lines if line and not line.startswith("-")]
    assert all(found), path
    return {match[1]: match[2] for match in found}


def conda(name: str) -> tuple[list[str], list[str]]:
    """(dependencies of conda itself, arguments of its pip) of an environment file."""
    content = yaml.safe_load((ENVS / f"{name}.yaml").read_text())
    inner = [part for part in content["dependencies"] if isinstance(part, dict)]
    return [part for part in content["dependencies"] if isinstance(part, str)], inner[0]["pip"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_conda_environments_hold_exactly_the_pins_of_pip(name):
    outer, inner = conda(name)
    assert all(re.fullmatch(r"[a-z]+=\d+(\.\d+)+", part) for part in outer), "conda's own dependencies are exact too"
    found = {match[1]: match[2] for part in inner if (match := PIN.fullmatch(part))}
    expected = pins(ENVS / "requirements.txt")
    if name == "cpu":
        expected["torch"] += "+cpu"
        assert f"--extra-index-url {CPU_INDEX}" in inner
    assert found == expected
    assert len([part for part in inner if not part.startswith("--")]) == len(expected), "nothing but pins and the index"


def test_no_file_of_pins_contradicts_another():
    main, dev, slurm = (pins(ENVS / f"requirements{suffix}.txt") for suffix in ("", "-dev", "-slurm"))
    assert not set(main) & set(dev) and not set(main) & set(slurm) and not set(dev) & set(slurm)


def test_every_rule_that_runs_a_script_names_an_environment_that_exists():
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        text = path.read_text()
        assert text.count("    shell:") == len(re.findall(r"^ +conda:\n +ENVIRONMENT$", text, re.MULTILINE)), path.name
    plan = (ROOT / "workflow" / "rules" / "plan.smk").read_text()
    named = re.findall(r'"\.\./\.\./envs/(\w+)\.yaml"', plan)
    assert sorted(named) == ["cpu", "gpu"] and all((ENVS / f"{name}.yaml").is_file() for name in named)


@pytest.mark.parametrize("path", sorted(ENVS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_pin_but_torch_has_its_hashes_in_a_lock_file_that_names_no_index(path):
    """``make lock`` after an edit of a requirements file. torch has no hashes: an index for CPUs
    and one for GPUs give other builds."""
    entries = re.split(r"\n(?=\S)", path.with_suffix(".lock").read_text().strip())[1:]
    locked = {match[1]: match[2] for entry in entries if (match := PIN.match(entry.split(" ")[0]))}
    assert locked == {name: version for name, version in pins(path).items() if name != "torch"}
    assert all(re.fullmatch(r"\S+ (\\\n    --hash=sha256:[0-9a-f]{64} ?)+", entry) for entry in entries)


def test_the_audit_of_a_forge_covers_every_requirements_file_with_pinned_tools():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "audit.yml").read_text())
    job = workflow["jobs"]["audit"]
    assert set(job["strategy"]["matrix"]["requirements"]) == {path.stem for path in ENVS.glob("*.txt")}
    # YAML reads `on` as true
    assert "schedule" in workflow[True] and workflow["permissions"] == {"contents": "read"}
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in job["steps"] if "uses" in step)
    assert any(re.search(r"pip install pip-audit==[\d.]+$", step.get("run", "")) for step in job["steps"])
