"""Campaign of bad inputs: hundreds of generated configs and model folders, each refused soon in a
few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import bad_inputs
from checkouts import ROOT
from quantgrid.config import validation
from quantgrid.config.mistakes import MOST_MISTAKES

SECONDS, MEGABYTES, LINES, LENGTH = 10, 1000, 3, 1000


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Outcome of every bad input, from one process of bounded memory without torch."""
    command = [sys.executable, str(ROOT / "tests" / "bad_inputs.py"), str(tmp_path_factory.mktemp("bad"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    valid, *found = map(json.loads, done.stdout.splitlines())
    assert valid["outcome"] == "accepted", valid["message"]
    return found


def test_every_bad_input_is_refused_in_a_few_lines_in_seconds_and_little_memory(outcomes):
    assert len(outcomes) >= 300 and len({found["name"] for found in outcomes}) == len(outcomes)
    wrong = [
        f"{found['name']}: {found['outcome']} {found['message']}"
        for found in outcomes
        if found["outcome"] != "refused"
        or not 1 <= len(found["message"].splitlines()) <= LINES
        or len(found["message"]) > LENGTH
        or "Traceback" in found["message"]
    ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(outcomes)}", *wrong[:20]])
    assert (
        max(found["seconds"] for found in outcomes) < SECONDS and max(found["peak"] for found in outcomes) < MEGABYTES
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file: duplicate below", "line 3: the key 'gptq' is written twice, first in line 2"),
        ("file: billion laughs", "more than 50000 values; aliases count at each use"),
        (
            "transforms.learned.learning_rate: text",
            "'1e-5' is not accepted; expected a number >= 0.0 (text in YAML; write 1.0e-5)",
        ),
        ("formats.int4-mse.weight.clip_ratio: text", "(text in YAML; write 1.0e-5)"),
        ("seed: 10**400", "is out of range"),
        ("seed: NaN", "seed: nan is out of range; expected a finite number"),
        ("studies.s.granularities: 1", "studies.s.granularities: unknown granularity 'group-999"),
        ("results_dir: wildcard", "holds braces, which Snakemake reads as wildcards"),
        ("results_dir: bucket", "is a URL; name a folder"),
        ("results_dir: dash", "begins with '-', which command-line tools read as an option"),
        ("results_dir: 300", "300 characters"),
        ("name of models: line break", r"'x\n' is not accepted as a name"),
        ("name of studies: dash", "a leading '-' is read as an option"),
        ("name of studies: dot", "a leading '.' hides files"),
        ("name of formats: long", "65 characters"),
        ("name of models: other case", "models.TINY: differs from 'tiny' only in upper and lower case"),
        ("models.w.package: 1", "models.w.package: '-a==1' is not accepted; expected name==version"),
    ],
)
def test_the_message_says_what_is_wrong(outcomes, name, message):
    [found] = [found for found in outcomes if found["name"] == name]
    assert message in found["message"]


@pytest.mark.parametrize("written", ["1e-5", "2E5", "1.e7", "+3e-2"])
def test_a_number_that_yaml_reads_as_text_comes_with_one_that_it_reads_as_a_number(written):
    """YAML 1.1 wants a point and a sign in front of the exponent."""
    from quantgrid.ground.errors import text_hint

    assert yaml.safe_load(written) == written
    suggested = text_hint(written).removeprefix(" (text in YAML; write ").removesuffix(")")
    assert yaml.safe_load(suggested) == float(written)
    assert not text_hint("v1e5") and not text_hint(1e-5)


def test_aliases_and_merged_mappings_within_bounds_are_read_as_before(tmp_path):
    text = "a: &a {method: gptq, damping: 0.1}\nb: {<<: *a, damping: 0.2}\nc: [*a, *a]\n"
    (tmp_path / "x.yaml").write_text("﻿" + text, encoding="utf-8")
    assert validation.read(tmp_path / "x.yaml") == yaml.safe_load(text)


def test_a_results_folder_in_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert validation.check(bad_inputs.with_value("results_dir", "~/here/../results/"))["results_dir"] == str(
        tmp_path / "results"
    )


def test_a_long_list_of_mistakes_is_cut():
    config = bad_inputs.valid()
    config["models"] |= {f"m{number}": 5 for number in range(60)}
    with pytest.raises(validation.ConfigError, match="60 mistakes") as caught:
        validation.check(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == MOST_MISTAKES + 2 and lines[-1] == "  ... and 40 more"


def refused(command: list[str], folder: Path) -> list[str]:
    """Lines of standard error of a command that has to fail."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode not in (0, -9, -11), done.stdout + done.stderr
    return done.stderr.strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "duplicate below",
        "billion laughs",
        "alias of itself",
        "deep flow",
        "long number",
        "octal",
        "tab",
        "python",
        "empty",
    ],
)
def test_commands_end_with_the_message_alone(tmp_path, name):
    (tmp_path / "bad.yaml").write_text(bad_inputs.TEXTS[name])
    for script in ("run_workflow.py", "estimate_run.py"):
        lines = refused([str(ROOT / "scripts" / script), "--configfile", "bad.yaml"], tmp_path)
        assert 1 <= len(lines) <= LINES and "bad.yaml" in lines[0] and "Traceback" not in "".join(lines), lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": "1e-5"}, "seed: '1e-5'"), ({"results_dir": "r/{x}"}, "holds braces"), ({"studies": {}}, "studies")],
)
def test_plain_snakemake_ends_with_the_message_alone(tmp_path, change, message):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**bad_inputs.valid(), **change}))
    lines = refused(
        ["-m", "snakemake", "--cores", "1", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "bad.yaml"],
        tmp_path,
    )
    assert len(lines) == 1 and lines[0].startswith("quantgrid: ") and message in lines[0], lines


@pytest.mark.slow
def test_plain_snakemake_does_not_let_the_last_of_two_equal_keys_win(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad_inputs.valid()) + "seed: 2\n")
    lines = refused(
        ["-m", "snakemake", "-n", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "bad.yaml"], tmp_path
    )
    assert len(lines) == 1 and "bad.yaml, line" in lines[0] and "the key 'seed' is written twice" in lines[0], lines
