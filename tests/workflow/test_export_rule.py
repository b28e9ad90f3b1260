"""Exports through the workflow and the command: a folder beside its record, a deleted checkpoint made
again, bad input in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from in_process import run_script
from quantgrid.ground.places import ROOT, SCRIPTS
from quantgrid.ground.storage import read_json

DATA = ROOT / "tests" / "data"
CELL = "none/rtn/channel/w4a16"


def config_in(folder: Path) -> Path:
    content = {
        "results_dir": str(folder / "results"),
        "compute": {"device": "cpu", "dtype": "float32"},
        "models": {"tiny": {"source": "local", "path": str(DATA / "tiny-llama")}},
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


def asked(config: Path, **options: object) -> subprocess.CompletedProcess:
    """`make export` in this process."""
    given = {
        "configfile": config,
        "model": "tiny",
        "cell": CELL,
        "to": "dense",
        "out": config.parent / "out",
        **options,
    }
    return run_script("export", *(word for name, value in given.items() for word in (f"--{name}", value)))


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
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_ends_with_one_line(options, message, tmp_path):
    done = asked(config_in(tmp_path), **options)
    assert done.returncode == 1 and done.stderr.startswith("export: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "results").exists()


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
    words += ["--cell", "no transform + RTN, w4a16 channel", "--out", tmp_path / "out", "--cores", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{tmp_path / 'out'}: {CELL} for dense" in done.stdout
    made = read_json(tmp_path / "out" / "export.json")
    assert made["target"] == "dense" and made["check"]["accepted"]
    assert yaml.safe_load((tmp_path / "out" / "quantgrid.yaml").read_text())["cell"] == CELL
    shutil.rmtree(tmp_path / "out")
