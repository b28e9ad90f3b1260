"""Exports through the workflow and the command: a folder beside its record, a deleted checkpoint made
again, bad input in one line."""

from __future__ import annotations

import errno
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import export
from in_process import Done, run_script
from overview_cases import results
from quantgrid.config import validation
from quantgrid.config.exports import cell_name
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT, SCRIPTS
from quantgrid.ground.storage import read_json
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims import recommendation
from quantgrid.reporting.style import recipe_label

DATA = ROOT / "tests" / "data"
CELL = "none/rtn/channel/w4a16"


def config_in(folder: Path) -> Path:
    content = {
        "results_dir": str(folder / "results"),
        "compute": {"device": "cpu", "dtype": "float32"},
        "models": {name: {"source": "local", "path": str(DATA / "tiny-llama")} for name in ("tiny", "unused")},
        "corpora": {
            "text": {"source": "local", "path": str(DATA / "smoke-calibration.txt"), "windows": 20, "window": 16},
            "docs": {"source": "local", "path": str(DATA / "smoke-evaluation.txt"), "windows": 4, "window": 16},
        },
        "calibrations": {"default": {"corpus": "text", "samples": 16}},
        "evaluate": {"perplexity": ["docs"]},
        "exports": [{"model": "tiny", "cell": CELL, "to": "compressed-tensors"}],
        "studies": {
            "s": {
                "models": ["tiny"],
                "transforms": ["none"],
                "mitigations": ["rtn"],
                "granularities": ["channel"],
                "formats": ["w4a16", "int4", "nf4"],
            }
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def asked(config: Path, words: list[str] | None = None, **options: object) -> Done:
    """`make export` in this process; ``words`` are further options."""
    given = {
        "configfile": config,
        "model": "tiny",
        "cell": CELL,
        "to": "dense",
        "out": config.parent / "out",
        **options,
    }
    pairs = (word for name, value in given.items() for word in (f"--{name}", value))
    return run_script("export", *pairs, *(words or []))


NF4 = "none/rtn/channel/nf4"
BAD = [
    (
        {"cell": "none/rtn/channel/w4a17"},
        "CELL: unknown cell 'none/rtn/channel/w4a17'; similar: none/rtn/channel/w4a16",
    ),
    ({"to": "onnx"}, "TO: unknown target 'onnx'"),
    ({"model": "tinny"}, "MODEL: unknown model 'tinny' - did you mean 'tiny'?"),
    ({"cell": NF4, "to": "compressed-tensors"}, f"CELL: compressed-tensors cannot hold '{NF4}': no format holds nf4"),
    ({"cell": ""}, "results: no results yet; `make run CONFIG="),
    ({"cell": "", "model": "unused"}, "config.yaml quantizes 'unused'; they have tiny"),
    ({"model": ""}, "MODEL: none is named; name one, as in MODEL=tiny; there are tiny"),
    ({"to": ""}, "TO: none is named; name one, as in TO=compressed-tensors; there are compressed-tensors, "),
    ({"out": ""}, "OUT: no folder is named; name a new one, as in OUT=tiny-dense"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_ends_with_one_line(options, message, tmp_path):
    done = asked(config_in(tmp_path), **options)
    assert done.returncode == 1 and done.stderr.startswith("export: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "results").exists()


def test_without_results_a_command_that_needs_none_is_named(tmp_path):
    """The command has all words, and a cell that the target can hold."""
    config = config_in(tmp_path)
    done = asked(config, cell="", to="compressed-tensors", out=tmp_path / "a b")
    command = done.stderr.strip().split("`")[-2]
    words = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    assert words == {
        "CONFIG": str(config),
        "MODEL": "tiny",
        "TO": "compressed-tensors",
        "OUT": str(tmp_path / "a b"),
        "CELL": CELL,
    }
    assert "makes them; a named cell needs none: `make export " in done.stderr


def test_a_recipe_is_found_as_the_report_prints_it(tmp_path):
    """With the note of a training that kept its start, too."""
    cells = Plan(validation.load(config_in(tmp_path))).cells
    for cell in filter(lambda cell: cell.quantized, cells):
        for start_kept in (False, True):
            printed = recipe_label(cell.axes, {}) + " (start kept)" * start_kept
            assert export.labelled(cells, printed, {}) == cell
    assert export.labelled(cells, "(start kept)", {}) is None


@pytest.mark.parametrize(
    ("named", "best"),
    [("weights", "none/rtn/channel/w4"), ("weights-activations", "none/rtn/channel/w4a4_served"), ("", None)],
)
def test_the_best_recipe_is_one_of_the_kind_of_deployment(named, best, tmp_path, monkeypatch):
    """Without a kind, a target that holds recipes of several kinds is refused with their names."""
    content = yaml.safe_load(config_in(tmp_path).read_text()) | {"exports": []}
    content["formats"] = {"w4": {"preset": "w4a16", "weight": {"scale_format": "bf16"}}}
    content["studies"]["s"]["formats"] = ["w4", "w4a4_served"]
    plan = Plan(validation.check(content))
    records, items = results("tiny")
    records = records[records.cell.isin(["1", "8", "b"])]
    changed = {"format": records.format.replace({"w4a16_g64": "w4", "int4": "w4a4_served"})}
    records = records.assign(**changed, granularity=records.granularity.replace("group-64", "channel"))
    monkeypatch.setattr(recommendation, "read_results", lambda folder, advice: (records, items))
    given = SimpleNamespace(
        model="tiny", to="compressed-tensors", corpus="", bits=16.0, deployment=named, configfile="c", out="o"
    )
    cells = [cell for cell in plan.cells if cell.quantized]
    if best:
        assert cell_name(export.recommended(plan, cells, given, ())[0]) == best
    else:
        message = r"DEPLOYMENT: .*: weights \(.*w4\); weights-activations \(.*w4a4_served\); name one, as in DEPL"
        with pytest.raises(ConfigError, match=message):
            export.recommended(plan, cells, given, ())


@pytest.fixture
def made(tmp_path):
    """A finished export of two files, with the time stamp of Snakemake."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", ".snakemake_timestamp"):
        (folder / name).write_text("content")
    return folder


def test_the_copy_has_the_files_of_the_export_alone(made, tmp_path):
    export.place(made, tmp_path / "new" / "out")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_small_disk_at_out_is_named_with_the_place_of_the_export(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20))
    with pytest.raises(ConfigError, match=rf"OUT: .*out needs .* GB are free at .*; the export is in {made}"):
        export.place(made, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=21))
    export.place(made, tmp_path / "out")


def test_a_file_that_cannot_be_copied_is_named_with_the_reason(made, tmp_path, monkeypatch):
    """`shutil.copytree` collects the reasons of all files and has no ``strerror``."""

    def full(source, target, **_):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    copytree = shutil.copytree
    monkeypatch.setattr(
        shutil, "copytree", lambda source, target, ignore: copytree(source, target, False, ignore, copy_function=full)
    )
    message = r"OUT: .*out cannot be written \((config\.json|model\.safetensors): .*No space left on device.*\); the "
    with pytest.raises(ConfigError, match=message):
        export.place(made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_dry_run_writes_nothing_and_says_so(tmp_path, monkeypatch):
    """Even if the results have the export; options that leave it out are an error."""
    monkeypatch.setattr(subprocess, "run", lambda words: subprocess.CompletedProcess(words, 0))
    config = config_in(tmp_path)
    done = asked(config, words=["--until", "fetch_model"])
    assert done.returncode == 1
    assert "export: ARGS: with --until fetch_model the workflow ends without the export " in done.stderr

    def exported(words):
        Path(words[2]).mkdir(parents=True)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", exported)
    done = asked(config, words=["-n"])
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: not written, because these options run no job: -n" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    done = asked(config_in(tmp_path))
    assert done.returncode == 1 and "export: OUT: '" in done.stderr and "exists already" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_config_and_the_command_export_a_cell(tmp_path):
    """The rule first; then the command for another target, by the printed recipe, whose checkpoint is gone."""
    config = config_in(tmp_path)
    words = [sys.executable, SCRIPTS / "run_workflow.py", "exports", "--configfile", config, "--cores", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "results" / "exports" / "tiny" / CELL / "compressed-tensors").iterdir()
    report = read_json(folder / "export.json")
    assert report["target"] == "compressed-tensors" and report["check"]["accepted"]
    assert "perplexity" in (folder / "README.md").read_text()
    assert list((tmp_path / "results" / "digests" / "export_model").rglob("*.json"))
    assert not list((tmp_path / "results" / "quantized").rglob("w4a16/*/model.safetensors")), "temporary"

    words = [sys.executable, SCRIPTS / "export.py", "--configfile", config, "--model", "tiny", "--to", "dense"]
    words += ["--cell", "W4A16 channel RTN", "--out", tmp_path / "out", "--cores", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{tmp_path / 'out'}: {CELL} for dense" in done.stdout
    assert not (tmp_path / "out" / ".snakemake_timestamp").exists()
    made = read_json(tmp_path / "out" / "export.json")
    assert made["target"] == "dense" and made["check"]["accepted"]
    assert yaml.safe_load((tmp_path / "out" / "quantgrid.yaml").read_text())["cell"] == CELL
    shutil.rmtree(tmp_path / "out")
