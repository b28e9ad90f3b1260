"""Files for a forge and for contributors: workflows, hooks before a commit, templates, records of
decisions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from test_environments import ENVS, pins

from checkouts import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def content(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_pinned_actions_a_time_limit_and_rights_to_read_alone(path: Path):
    workflow = content(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job and 0 < job["timeout-minutes"] <= 180
        actions = [step for step in job["steps"] if "uses" in step]
        assert actions and all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in actions)
        assert all(
            step["with"]["persist-credentials"] is False
            for step in actions
            if step["uses"].startswith("actions/checkout@")
        )


def test_every_change_is_tested_on_every_python_and_the_rest_every_night():
    tests, nightly = (content(ROOT / ".github" / "workflows" / f"{name}.yml") for name in ("tests", "nightly"))
    assert {"push", "pull_request"} <= set(tests[True])  # YAML reads `on` as true
    assert "schedule" in nightly[True]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == [least, "3.12", "3.13"]
    assert [step["run"] for step in tests["jobs"]["tests"]["steps"] if "run" in step] == [
        "make lint",
        "make --assume-old=lint test",
    ]
    targets = nightly["jobs"]["nightly"]["strategy"]["matrix"]["target"]
    assert targets == ["test-slow", "test-nightly"] and all(
        re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets
    )
    assert all(workflow["concurrency"]["cancel-in-progress"] is True for workflow in (tests, nightly))


def test_hooks_before_a_commit_have_the_versions_of_the_tests():
    pinned = pins(ENVS / "requirements-dev.txt")
    hooks = [hook for repo in content(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    named = [dict([required.split("==")]) for hook in hooks for required in hook["additional_dependencies"]]
    assert {"ruff", "snakefmt", "codespell"} <= {name for required in named for name in required}
    assert all(pinned[name] == version for required in named for name, version in required.items())


def test_linters_of_make_lint_are_pinned():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    linters = set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))
    assert linters == {"ruff", "mypy", "lint-imports", "codespell", "snakefmt", "snakemake"}
    packages = linters - {"snakemake", "lint-imports"} | {"import-linter"}
    assert packages <= set(pins(ENVS / "requirements-dev.txt"))


def test_templates_of_issues_ask_for_what_they_require():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert {path.stem for path in forms} == {"bug", "method", "results"}
    for form in map(content, forms):
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields) and all(
            field["attributes"]["label"] for field in fields
        )
        assert any(field.get("validations", {}).get("required") for field in fields)


def test_decisions_are_short_linked_and_of_one_form():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert [path.name[:5] for path in DECISIONS] == [f"{number:04}-" for number in range(1, len(DECISIONS) + 1)]
    for path in DECISIONS:
        lines = path.read_text().splitlines()
        assert len(lines) <= 50 and f"(docs/decisions/{path.name})" in contributing
        assert [line[3:] for line in lines if line.startswith("## ")] == [
            "Context",
            "Decision",
            "Consequences",
            "Alternatives",
        ]
        named = re.findall(r"`((?:scripts|tests)/[\w/.]+\.py)`", path.read_text()) + re.findall(
            r"\]\((\.\./[\w./-]+\.md)", path.read_text()
        )
        assert named and all(
            (path.parent / name if name.startswith("..") else ROOT / name).is_file() for name in named
        ), path.name
