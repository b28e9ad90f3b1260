"""GPTQ and AWQ folders computed by gptqmodel's own kernels, in the environment that the Makefile makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from export_cases import cell
from quantgrid.exports.check import outside_python
from quantgrid.exports.export import export
from quantgrid.ground.storage import read_json
from quantgrid.mitigations.methods.rtn import rtn

FP16 = {"scale_format": "fp16"}
CASES = [
    ("gptq", {"preset": "w4a16", "weight": FP16}, "group-32", "gptq"),
    ("gptq", {"preset": "w8a16", "weight": FP16}, "channel", "gptq"),
    ("gptq", {"preset": "w4a16", "weight": {**FP16, "symmetric": False}}, "group-16", "gptq"),
    ("awq", {"preset": "w4a16", "weight": FP16}, "group-32", None),
    ("awq", {"preset": "w4a16", "weight": {**FP16, "symmetric": False}}, "group-32", None),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(outside_python()).is_file(), reason="needs make .venv-gptqmodel/.installed"),
]


@pytest.mark.parametrize("target,entry,granularity,version", CASES)
def test_gptqmodel_computes_the_cell(sources, tmp_path, target, entry, granularity, version):
    source = sources()
    made = cell(source, tmp_path / "cell", entry, granularity)
    report = export(source.model, made, None, source.windows, target, tmp_path / "out")
    assert report["check"]["loader"] == "gptqmodel"
    assert report["check"]["kl"] < 1e-4 and report["check"]["max_logit_difference"] < 0.1
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == "float16" and config["quantization_config"].get("checkpoint_format") == version


def test_gptqmodel_reads_zero_points_of_zero_in_the_second_version(sources, tmp_path):
    source = sources()
    entry = {"preset": "w4a16", "weight": {**FP16, "symmetric": False}}
    made = cell(source, tmp_path / "cell", entry, "group-16", mitigation=positive)
    report = export(source.model, made, None, source.windows, "gptq", tmp_path / "out")
    assert report["check"]["kl"] < 1e-3
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"


def positive(weight, statistics, scheme):
    """Round the magnitudes of ``weight``, whose zero points are 0."""
    return rtn(weight.abs(), statistics, scheme)
