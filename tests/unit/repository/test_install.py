"""Installation of the library with pip: what a wheel holds, and the public surface."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantgrid.ground.places import ROOT

SURFACE = """
import quantgrid.mitigations.methods.gptq, quantgrid.transforms.recipes.quarot, torch
from quantgrid.quantizer import dequantize, fake_quantize, pack, quantize, unpack
from quantgrid.schemes import PRESETS, QuantScheme, activation_scheme, scheme
x, how = torch.randn(4, 64), scheme("int4", granularity="group-32")
made = quantize(x, how)
assert torch.equal(dequantize(made), fake_quantize(x, how)) and activation_scheme("int4").symmetric is False
assert torch.equal(unpack(pack(made.codes, 4), 4, made.codes.shape, True), made.codes)
print(quantgrid.__file__)
"""


@pytest.mark.slow
def test_the_installed_library_has_the_public_surface(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "scripts", source / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True, text=True)
    assert (target / "quantgrid" / "py.typed").is_file() and not (target / "run_workflow.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", SURFACE], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(target)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
