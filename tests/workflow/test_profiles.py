"""Profiles: what they set is known to Snakemake and to the plugins, and names rules that exist."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from checkouts import ROOT, Checkout, one_cell, refusing_slurm
from quantgrid.plan.estimates import SHORTEST

PROFILES = sorted(path.parent.name for path in (ROOT / "workflow" / "profiles").glob("*/config.yaml"))
PLUGINS = {
    "slurm": ["snakemake_executor_plugin_slurm"],
    "slurm-gpu": ["snakemake_executor_plugin_slurm"],
    "kubernetes": ["snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_s3"],
    "s3": ["snakemake_storage_plugin_s3"],
}
RULES = {
    name
    for path in (ROOT / "workflow" / "rules").glob("*.smk")
    for name in re.findall(r"^ *rule (\w+):", path.read_text(), re.MULTILINE)
}


def content(name: str) -> dict:
    return yaml.safe_load((ROOT / "workflow" / "profiles" / name / "config.yaml").read_text())


def known_options() -> set[str]:
    """Every long option of Snakemake's command line with the installed plugins'."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    return {option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")}


@pytest.mark.parametrize("name", PROFILES)
def test_every_setting_is_an_option_of_snakemake_or_of_its_plugin(name):
    absent = [plugin for plugin in PLUGINS.get(name, []) if not find_spec(plugin)]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed")
    assert not set(content(name)) - known_options()


@pytest.mark.parametrize("name", PROFILES)
def test_plugins_read_every_value_as_it_stands(name):
    """Not by name alone: Snakemake parses the profile, the plugin makes its settings of it, and
    these hold what the file says."""
    from snakemake.cli import parse_args
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry
    from snakemake_interface_storage_plugins.registry import StoragePluginRegistry

    if absent := [plugin for plugin in PLUGINS.get(name, []) if not find_spec(plugin)]:
        pytest.skip(f"{', '.join(absent)} not installed")
    profile = content(name)
    _, read = parse_args(["--workflow-profile", str(ROOT / "workflow" / "profiles" / name), "--cores", "1"])
    own = {"executor": ExecutorPluginRegistry(), "storage": StoragePluginRegistry()}
    chosen = {
        "executor": (profile.get("executor"), f"{profile.get('executor')}-"),
        "storage": (profile.get("default-storage-provider"), f"storage-{profile.get('default-storage-provider')}-"),
    }
    for kind, (plugin, prefix) in chosen.items():
        if plugin is not None:
            settings = own[kind].get_plugin(plugin).get_settings(read)
            settings = settings.get_settings() if kind == "storage" else settings
            said = {key.removeprefix(prefix): value for key, value in profile.items() if key.startswith(prefix)}
            assert said and {key: getattr(settings, key.replace("-", "_")) for key in said} == said
    assert {
        rule: {resource: found.value for resource, found in asked.items()} for rule, asked in read.set_resources.items()
    } == profile.get("set-resources", {})


@pytest.mark.parametrize("name", PROFILES)
def test_rules_and_groups_that_a_profile_names_exist(name):
    profile = content(name)
    named = {*profile.get("set-resources", {}), *(entry.split("=")[0] for entry in profile.get("groups", []))}
    assert named <= RULES
    groups = {entry.split("=")[1] for entry in profile.get("groups", [])}
    assert {entry.split("=")[0] for entry in profile.get("group-components", [])} == groups
    assert profile["scheduler"] == "greedy" and profile["rerun-incomplete"] and profile["keep-going"]


def test_both_slurm_profiles_differ_by_gpus_alone():
    with_gpu = content("slurm-gpu")
    own = {key: with_gpu[key] for key in with_gpu if key not in ("resources", "set-resource-scopes", "set-resources")}
    assert own == content("slurm")
    assert all(resources == {"gpu": 1} for resources in with_gpu["set-resources"].values())
    assert content("gpus")["set-resources"] == with_gpu["set-resources"]


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize("name", ["slurm", "slurm-gpu", "gpus"])
def test_a_dry_run_gives_every_job_its_memory_and_those_with_a_model_their_card(name, tmp_path):
    if any(not find_spec(plugin) for plugin in PLUGINS.get(name, [])):
        pytest.skip("the executor plugin is not installed")
    output = Checkout.make(tmp_path / "quantgrid").run("smoke", "--profile", name, "--dry-run")
    listed = re.findall(
        r"^( *)(?:local)?rule (\w+):\n((?:\1    .*\n)*)", output, re.MULTILINE
    )  # jobs of a group are indented
    asked = {rule: re.search(r"^ *resources: (.*)$", body, re.MULTILINE)[1] for _, rule, body in listed}
    with_card = {rule for rule, resources in asked.items() if "gpu=1" in resources}
    on_cards = set(content("gpus")["set-resources"]) - {"screen_cell"}  # the smoke config has no race
    assert with_card == (set() if name == "slurm" else on_cards)
    assert all("mem_mb=" in asked[rule] and "runtime=" in asked[rule] for rule in (*on_cards, "fetch_model"))


def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> dict[str, str]:
    """Rules of a Slurm job, joined -> the command that submits it, of one cell that everything else
    is there for; nothing is submitted: the commands of Slurm are stand-ins, and sbatch refuses."""
    checkout = one_cell(Checkout.make(tmp_path / "quantgrid"))
    checkout.pretend("smoke")
    shutil.rmtree(checkout.folder / "results-smoke" / "evaluations" / "reference-1m-planted" / "none" / "gptq")
    path, kept = refusing_slurm(tmp_path)
    monkeypatch.setenv("PATH", path)
    output = checkout.run("smoke", "--profile", profile, "--retries", "0", ok=False)
    assert kept.is_file(), output[-3000:]
    calls = [line for line in kept.read_text().splitlines() if "--comment" in line]
    return {re.search(r"--comment \w*rule_(\w+)", line)[1]: line for line in calls}


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize("profile", ["slurm", "slurm-gpu"])
def test_the_steps_of_a_cell_are_one_slurm_job_with_one_card_and_the_sum_of_their_times(tmp_path, monkeypatch, profile):
    """Two evaluations could run side by side; with a card they take turns, and the job does not ask
    for two."""
    if not find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("the executor plugin is not installed")
    [(rules, command)] = submitted(tmp_path, monkeypatch, profile).items()
    assert all(rule in rules for rule in ("quantize_model", "evaluate_perplexity", "measure_residual_error"))
    assert re.findall(r"--gpus\S+", command) == (["--gpus=1"] if profile == "slurm-gpu" else [])
    assert re.search(r"-t (\d+)", command)[1] == str(SHORTEST * (3 if profile == "slurm-gpu" else 2))
