"""GPTQ and AWQ folders computed by gptqmodel's own kernels, in the environment that the Makefile makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from export_cases import cell
from quantgrid.exports.check import outside_python
from quantgrid.exports.export import export
from quantgrid.ground.storage import read_json

FP16 = {"scale_format": "fp16"}
CASES = [
    ("gptq", {"preset": "w4a16", "weight": FP16}, "group-32", "gptq"),
    ("gptq", {"preset": "w8a16", "weight": FP16}, "channel", "gptq"),
    ("gptq", {"preset": "w4a16", "weight": {**FP16, "symmetric": False}}, "group-16", "gptq_v2"),
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
