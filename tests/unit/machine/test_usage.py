"""Time and memory that a job records of itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from in_process import run_script
from quantgrid.ground.provenance import canonical
from quantgrid.machine.usage import COLD, Usage, begin, usage
from quantgrid.reporting.data.costs import read_one


def test_the_table_is_one_that_the_reports_read(tmp_path: Path):
    path = tmp_path / "job.tsv"
    path.write_text(Usage(12.345, 812.25, 10.5, "warm").table())
    assert path.read_text() == "s\tmax_rss\tcpu_time\tstart\n12.35\t812.2\t10.50\twarm\n"
    assert read_one(path) == {"seconds": 12.35, "max_rss_mb": 812.2, "cpu_seconds": 10.5}


def test_a_process_measures_its_wall_time_processor_time_and_peak():
    begun = begin()
    assert begun <= time.monotonic()
    before, block = usage(begun, COLD), bytearray(os.urandom(1)) * (64 << 20)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = usage(begun, COLD)
    assert after.seconds - before.seconds >= 0.19 and after.cpu_seconds - before.cpu_seconds >= 0.19
    assert after.peak_mb > 64 and len(block) == 64 << 20 and after.start == COLD


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_leaves_its_costs_where_it_is_told_and_its_script_does_not_see_the_option(tmp_path: Path, asked: bool):
    figures = {suffix: tmp_path / f"number-lines.{suffix}" for suffix in ("png", "pdf", "svg", "csv")}
    words = [word for name, path in figures.items() for word in (f"--{name}", path)]
    costs = ["--costs", tmp_path / "costs.tsv"] * asked
    done = run_script(
        "run_job", "plot_number_lines", *words, *costs, "--spec", canonical({"code": "-"}), folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all(path.is_file() for path in figures.values()) and (tmp_path / "costs.tsv").is_file() == asked
    if asked:
        assert read_one(tmp_path / "costs.tsv")["seconds"] > 0 and (tmp_path / "costs.tsv").read_text().endswith(
            "cold\n"
        )
