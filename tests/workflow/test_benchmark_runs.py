"""The benchmarks' own arithmetic, and the way that each takes, with shapes that say nothing of
speed."""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import gpu
import growth
import numpy as np
import pytest
import records
import torch
from growth_figure import plot
from growth_fit import Fit, fit
from random_models import Size

from quantgrid.ground.places import ROOT
from quantgrid.reporting.figures.study_figures import save

GPU = [sys.executable, str(ROOT / "tests" / "benchmarks" / "gpu.py")]


@pytest.mark.parametrize("offset, factor, exponent", [(3, 20, 2.5), (0, 4, 1), (5, 5, 0.7)])
def test_a_power_is_found(offset, factor, exponent):
    sizes = [64, 256, 512, 1024, 2048]
    found = fit(sizes, [offset + factor * (size / 2048) ** exponent for size in sizes])
    assert (found.offset, found.factor, found.exponent) == pytest.approx((offset, factor, exponent), abs=1e-6)
    assert found.error < 1e-6
    assert found(2048) == pytest.approx(offset + factor)


def test_the_error_of_an_exponent_covers_noise():
    sizes, noise = [1, 4, 8, 16, 32], np.random.default_rng(0)
    values = [[(5 + 10 * size / 32) * (1 + 0.02 * noise.normal()) for size in sizes] for _ in range(30)]
    inside = [abs(found.exponent - 1) < 3 * found.error for found in (fit(sizes, each) for each in values)]
    assert np.mean(inside) > 0.8


def test_what_does_not_grow_has_no_factor():
    assert fit([1, 2, 4, 8], [3, 3, 3, 3]).factor == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "exponent, error, expected", [(1.05, 0.01, "no"), (0.5, 2.0, "no"), (1.3, 0.05, "yes"), (1.3, 0.15, "undecided")]
)
def test_noise_is_no_growth(exponent, error, expected):
    assert growth.verdict(Fit(offset=5.0, factor=10.0, exponent=exponent, error=error, largest=64), 1) == expected


def test_three_sizes_are_too_few():
    with pytest.raises(ValueError, match="four sizes, got"):
        fit([1, 2, 4, 4], [1, 2, 3, 3])


def measurements(faster):
    """Measurements that grow with the exponents of the algorithms, except the seconds of
    ``faster``, whose exponent is a half higher."""
    return [
        {
            "axis": axis,
            "size": size,
            "job": job,
            "processor_seconds": 2 + 8 * (size / 32) ** (seconds + 0.5 * (job == faster)),
            "peak_mb": 300 + 900 * (size / 32) ** memory,
        }
        for axis, jobs in growth.COSTS.items()
        for job, (seconds, memory) in jobs.items()
        for size in (1, 4, 8, 16, 32)
    ]


def test_table_and_figure_of_growth(tmp_path):
    measured = measurements(growth.GPTQ)
    fits = growth.fits_of(measured)
    rows = growth.table_of(fits, measured)
    assert len(rows) == len(growth.OWN)
    assert {(row["case"], row["quantity"]) for row in rows if row["grows_faster"] == "yes"} == {
        (growth.GPTQ, "processor seconds")
    }
    assert {row["exponent"] for row in rows if row["case"] == growth.EVALUATE} == {"1.00", "2.00"}
    save(plot(measured, fits, growth.OWN, growth.QUANTITIES), [tmp_path / "growth.png", tmp_path / "growth.svg"])
    drawn = (tmp_path / "growth.svg").read_text()
    assert "evaluate_perplexity: 2.00 ± 0.00 (2)" in drawn
    assert all(axis in drawn for axis in growth.COSTS)


@pytest.mark.slow
def test_jobs_of_a_size_are_measured(tmp_path):
    found = dict(growth.measured_jobs(Size(64, 1, 2), tmp_path, growth.steps()))
    assert list(found) == list(growth.ALL)
    assert all(done.processor_seconds > 0 and done.peak_mb > 100 for done in found.values())


@pytest.mark.slow
def test_dry_runs_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "ALPHAS", (1,))
    ((cells, done),) = growth.measured_plans(tmp_path)
    assert cells == 200 and done.processor_seconds > 0


def test_rows_of_a_benchmark_replace_its_earlier_ones(tmp_path):
    records.record("a", [records.unmeasured("a", "case", "no device")], tmp_path)
    records.record(
        "b", [records.timed_row("b", "case", 1, "other", {"case": 2.0, "other": 4.0}, 0.6, rate="1 GB/s")], tmp_path
    )
    records.record("a", [records.unmeasured("a", "again", "no device")], tmp_path)
    rows = list(csv.DictReader((tmp_path / "benchmarks.csv").open(newline="")))
    assert [(row["benchmark"], row["case"], row["device"], row["ratio"], row["reached"]) for row in rows] == [
        ("b", "case", "cpu", "0.5", "yes"),
        ("a", "again", "", "", "not measured: no device"),
    ]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    assert all(head.startswith(row["commit"]) and bool(row["commit"]) == bool(head) for row in rows)


def gpu_rows(folder, *options):
    subprocess.run([*GPU, "--results", str(folder), *options], check=True, timeout=800)
    return list(csv.DictReader((folder / "benchmarks.csv").open(newline="")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured_in_its_place(tmp_path):
    rows = gpu_rows(tmp_path)
    assert len(rows) == 4
    assert all(
        row["reached"] == "not measured: no CUDA device" and not row["milliseconds"] and not row["device"]
        for row in rows
    )


@pytest.mark.slow
def test_the_way_of_a_gpu_on_the_cpu(tmp_path):
    small = ("--device", "cpu", "--small", "--repeats", "1", "--threads", "1", "--peers", "nowhere")
    rows = gpu_rows(tmp_path, *small, "--parts", "fake_quantize", "solver", "evaluation")
    assert [row["case"].split(",")[0] for row in rows] == [
        "activation in int4",
        "activation in nvfp4",
        "GPTQ of a layer of small",
        "small",
        "small",
    ]
    assert all(row["device"] == "cpu" and float(row["milliseconds"]) > 0 for row in rows)
    assert rows[2]["reached"] == "not measured: llm-compressor is not installed"
    assert [row["rate"].split(" ")[1] for row in rows[2:]] == ["s/layer", "tokens/s", "tokens/s"]
    (late,) = gpu_rows(tmp_path, *small, "--parts", "smoke", "--minutes", "-1")
    assert late["case"] == "smoke config" and late["reached"] == "not measured: more than -1 minutes"


def test_perplexities_of_a_gpu_are_compared_by_cell():
    cells = [("none", "rtn", "100"), ("flatquant", "rtn", "100"), ("none", "gptq", "5000")]
    golden = [
        {**dict.fromkeys(gpu.AXES, "x"), "transform": transform, "mitigation": mitigation, "perplexity": value}
        for transform, mitigation, value in cells
    ]
    changed = [
        {**cell, "metric": "perplexity", "value": str(float(cell["perplexity"]) * factor)}
        for cell, factor in zip(golden, (1 / 1.004, 1.05, 1.08))
    ]
    options = argparse.Namespace(device=torch.device("cpu"))
    stable, others = gpu.compared(changed, golden, options)
    assert (float(stable["ratio"]), stable["reached"]) == (pytest.approx(1.004, abs=0.005), "yes")
    assert (float(others["ratio"]), others["reached"]) == (1.08, "yes")
    worse = [{**row, "value": str(2 * float(row["value"]))} for row in changed]
    assert [row["reached"] for row in gpu.compared(worse, golden, options)] == ["no", "no"]
