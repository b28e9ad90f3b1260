"""Files that a config no longer plans: listed, deleted on request, and nothing else touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from checkouts import ROOT
from in_process import Done, run_script
from quantgrid.config import check
from quantgrid.jobs.integrity import write_record
from quantgrid.jobs.stale import STUDY_RULES, delete, unused
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.steps import REPORTS

STUDY_FILES = (
    "studies/{}.csv",
    "studies/{}.items.parquet",
    "tables/{}.csv",
    "tables/{}.md",
    "comparisons/{}.md",
    "figures/{}.svg",
    "logs/plot_study/{}.log",
    "benchmarks/plot_study/{}.tsv",
)


@pytest.fixture
def config(tmp_path: Path) -> dict:
    content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    for corpus in content["corpora"].values():
        corpus["path"] = str(ROOT / corpus["path"])
    return {**content, "results_dir": str(tmp_path / "results")}


def plan_of(config: dict) -> Plan:
    return Plan(check(config))


def write(path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("content")
    return path


def results_of(plan: Plan) -> set[Path]:
    """Make every file that a finished run of ``plan`` leaves, logs and benchmarks as the rules name
    them among them."""
    made = set()
    for rule, steps in plan.all_steps().items():
        for step in steps:
            made |= {
                write(Path(path, "config.json") if rule == "fetch_model" else path) for path in step.outputs.values()
            }
            made.add(Path(write_record(rule, step.outputs.values())))
            axes = [
                step.wildcards[name]
                for name in (
                    "model",
                    "transform",
                    "mitigation",
                    "granularity",
                    "format",
                    "target",
                    "corpus",
                    "calibration",
                    "shard",
                )
                if name in step.wildcards
            ]
            made |= {
                write(Path(plan.results, "logs", rule, *axes, f"{step.key}.log")),
                write(Path(plan.results, "benchmarks", rule, *axes, f"{step.key}.tsv")),
            }
    made |= {write(Path(plan.results, name.format(study))) for study in plan.studies for name in STUDY_FILES}
    made |= {
        Path(write_record(rule, [plan.pattern(rule, output).format(study=study) for output in REPORTS[rule]]))
        for study in plan.studies
        for rule in STUDY_RULES
    }
    whole = (
        "results.csv",
        "claims.csv",
        "pareto.svg",
        "report.html",
        "logs/collect_results.log",
        "benchmarks/collect_results/all.tsv",
        "checks/reference-1m-planted.json",
        "logs/check_baseline/reference-1m-planted.log",
        "benchmarks/check_baseline/reference-1m-planted.tsv",
    )
    made |= {write(Path(plan.results, name)) for name in whole}
    return made


def listed(found: list) -> set[Path]:
    return {file for place in found for file in place.files}


def test_nothing_of_the_config_itself_is_unused(config):
    plan = plan_of(config)
    results_of(plan)
    assert unused(plan) == []


def test_a_removed_cell_and_its_steps_are_listed_and_deleted_and_no_other_file(config):
    before = results_of(plan_of(config))
    # smoothquant is used nowhere else
    config["studies"]["methods"]["also"][0]["transforms"] = ["hadamard"]
    config["report"]["distributions"].remove("smoothquant")
    plan = plan_of(config)
    kept = results_of(plan)
    found = unused(plan)
    assert listed(found) == before - kept and listed(found)
    assert {axis for place in found for axis in place.place.split("/")} >= {
        "smoothquant",
        "transforms",
        "quantized",
        "evaluations",
        "logs",
    }
    assert all("smoothquant" in place.place for place in found)
    assert sum(place.size for place in found) == sum(path.stat().st_size for path in before - kept)
    delete(found, plan.results)
    assert {path for path in Path(plan.results).rglob("*") if path.is_file()} == kept
    assert not [path for path in Path(plan.results).rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert unused(plan) == []


def test_an_edited_option_leaves_the_old_key_unused_and_a_removed_study_its_tables(config):
    before = results_of(plan_of(config))
    config["transforms"]["smoothquant"]["alpha"] = 0.6
    del config["studies"]["granularity"]
    plan = plan_of(config)
    kept = results_of(plan)
    assert listed(unused(plan)) == before - kept
    names = {path.relative_to(plan.results).as_posix() for path in before - kept}
    assert {name.format("granularity") for name in STUDY_FILES} <= names and any(
        "/smoothquant/" in name for name in names
    )
    assert not any("hadamard" in name for name in names)


def test_files_of_nobody_are_left_alone_and_links_are_not_followed(config, tmp_path):
    plan = plan_of(config)
    results, shared = Path(plan.results), write(tmp_path / "shared" / "weights")
    names = (
        "notes.md",
        "tables/methods-notes.txt",
        "quantized/README",
        "logs/my.log",
        "elsewhere/0123456789.json",
        "tables/mine.csv",
        "models/m/0123456789/weights.bin",
        "quantized/m/none/rtn/channel/int4/0123456789/notes.txt",
        "figures/mine.png",
        "evaluations/m/none/rtn/channel/int4/error/0123456789.json",
        "calibration/m/default/0123456789/notes.txt",
    )
    mine = [write(results / name) for name in names]
    link = results / "calibration" / "m" / "default" / "0123456789" / "statistics.safetensors"
    os.symlink(shared, link)
    record = Path(write_record("calibrate_model", [link]))
    half = write(results / "corpora" / "m" / "docs" / ".0123456789.4711.safetensors")
    fetching = write(results / "models" / "m" / ".0123456789.4711" / "model.safetensors")
    found = unused(plan)
    assert listed(found) == {link, half, record, fetching}
    assert {file for place in found for file in place.foreign} == set(mine[5:])
    delete(found, plan.results)
    assert shared.exists() and not link.is_symlink() and all(path.exists() for path in mine)


def test_another_config_that_shares_the_folder_keeps_what_no_record_names(config):
    """Files of a colleague's quantgrid from before there were records are left, and said."""
    plan = plan_of(config)
    old = [
        write(Path(plan.results, f"evaluations/m/none/rtn/channel/int4/error/{key}.json"))
        for key in ("0123456789", "abcdefabcd")
    ]
    write_record("quantize_model", [old[0]])
    found = unused(plan)
    assert old[0] in listed(found) and old[1] not in listed(found)
    damaged = Path(plan.results, "digests/quantize_model/m/none/rtn/channel/int4/0123456789.json")
    damaged.write_text("{")
    assert old[0] not in listed(unused(plan)), "a record that cannot be read says nothing"


def command(config: dict, tmp_path: Path, *options: str) -> Done:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return run_script("clean_unused", "--configfile", "config.yaml", *options, folder=tmp_path)


def test_the_command_lists_first_deletes_when_told_and_never_beside_a_run(config, tmp_path):
    plan = plan_of(config)
    old = write(Path(plan.results, "evaluations/reference-1m-planted/gone/rtn/channel/int4/error/0123456789.json"))
    write_record("quantize_model", [old])
    foreign = write(old.with_name("abcdefabcd.json"))
    first = command(config, tmp_path)
    assert (
        first.returncode == 0
        and "evaluations/reference-1m-planted/gone/rtn/channel/int4/error/0123456789" in first.stdout
    )
    assert "nothing is deleted" in first.stdout and old.exists()
    assert f"1 files are kept because no record names them as written by quantgrid, such as {foreign}" in first.stdout
    lock = write(tmp_path / ".snakemake" / "locks" / "0.input.lock")
    refused = command(config, tmp_path, "--delete")
    assert (
        refused.returncode != 0
        and "a run is active" in refused.stderr
        and "Traceback" not in refused.stderr
        and old.exists()
    )
    lock.unlink()
    assert command(config, tmp_path, "--delete").stdout.endswith("deleted\n") and not old.exists() and foreign.exists()
    assert "0 files" in command(config, tmp_path, "--delete").stdout
