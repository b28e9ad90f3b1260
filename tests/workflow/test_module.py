"""quantgrid as a module of another workflow: the documented example, and from a tag."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkouts import Checkout, refusing_slurm

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
TAG = "v9.9.9"
SNAKEFILE = f"""
configfile: "config.yaml"


module quantgrid:
    snakefile:
        github("example/quantgrid", path="Snakefile", tag="{TAG}")
    config:
        config


use rule * from quantgrid as quantgrid_*
"""


def snakemake(folder: Path, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


def test_another_workflow_uses_the_rules_with_its_own_config_and_adds_a_figure(tmp_path: Path):
    folder = Checkout.make(tmp_path / "quantgrid").folder / "docs" / "examples" / "module"
    snakemake(folder)
    assert (folder / "figures" / "spread.png").stat().st_size > 0 and (folder / "results" / "report.html").is_file()
    rows = list(csv.DictReader((folder / "results" / "results.csv").open()))
    assert {row["model"] for row in rows} == {"mine"} and {row["status"] for row in rows} == {"ok"}


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="the executor plugin is not installed")
def test_what_stays_with_the_driver_does_so_under_another_name(tmp_path: Path):
    """The rules of a module are renamed. On a cluster what needs the network is no job all the
    same: nothing is submitted."""
    folder = Checkout.make(tmp_path / "quantgrid").folder / "docs" / "examples" / "module"
    path, calls = refusing_slurm(tmp_path)
    snakemake(folder, "--executor", "slurm", "--jobs", "4", "--until", "quantgrid_tokenize_corpus", PATH=path)
    assert not calls.exists() and len(list((folder / "results" / "corpora").rglob("*.safetensors"))) == 2
    with pytest.raises(AssertionError, match="calibrate_model"):
        snakemake(folder, "--executor", "slurm", "--jobs", "4", "--until", "quantgrid_calibrate_model", PATH=path)
    assert calls.exists(), "what computes is a job"


def tagged(folder: Path) -> Checkout:
    """A git repository of quantgrid with one tag, whose working tree was broken since."""
    checkout = Checkout.make(folder)
    name = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        [*name, "commit", "--quiet", "--message", "release"],
        ["tag", TAG],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    for path in (checkout.folder / "scripts" / "run_job.py", checkout.folder / "workflow" / "rules" / "plan.smk"):
        path.write_text("raise SystemExit('later than the tag')\n")
    return checkout


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_tag_brings_rules_and_scripts_alike(tmp_path: Path):
    """Snakemake's cache of repositories already has the checkout, so nothing is fetched over the
    network."""
    checkout, mine, cache = tagged(tmp_path / "quantgrid"), tmp_path / "mine", tmp_path / "cache"
    clone = (
        cache
        / "snakemake"
        / "snakemake"
        / "source-cache"
        / "snakemake-git-cache"
        / "github.com"
        / "example"
        / "quantgrid"
    )
    subprocess.run(["git", "clone", "--quiet", "--bare", checkout.folder, clone], check=True)
    mine.mkdir()
    (mine / "Snakefile").write_text(SNAKEFILE)
    data = os.path.relpath(checkout.folder / "tests", mine)
    (mine / "config.yaml").write_text(
        (checkout.folder / "docs" / "examples" / "module" / "config.yaml").read_text().replace("../../../tests", data)
    )
    snakemake(mine, "results/steps.csv", "results/number-lines.png", XDG_CACHE_HOME=str(cache))
    [unpacked] = (mine / ".snakemake" / "quantgrid").iterdir()
    assert (unpacked / "scripts" / "run_job.py").is_file() and (
        mine / "results" / "number-lines.png"
    ).stat().st_size > 0
    assert {row["rule"] for row in csv.DictReader((mine / "results" / "steps.csv").open())} >= {
        "fetch_model",
        "quantize_model",
    }
    snakemake(mine, "--dry-run", XDG_CACHE_HOME=str(cache))
