"""Threads of a job are what its specification says, in torch and in every BLAS that is loaded: jobs
side by side do not oversubscribe the cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkouts import Checkout, one_cell
from quantgrid.config import validation
from quantgrid.plan.pipeline import Plan

# What Python imports by itself when it starts; every script of a rule, in a process or in a fork,
# says at its end how many threads there are.
CUSTOMIZE = """
import json, os, runpy, sys

run = runpy.run_path

def run_and_tell(path, **how):
    run(path, **how)
    if "torch" in sys.modules:
        from threadpoolctl import threadpool_info
        pools = [pool["num_threads"] for pool in threadpool_info()]
        with open({file!r}, "a") as file:
            print(json.dumps([path.split("/")[-1], os.getppid(), sys.modules["torch"].get_num_threads(), pools]), file=file)

runpy.run_path = run_and_tell
"""  # noqa: E501
RULES = ("calibrate_model", "fit_transform", "quantize_model", "evaluate_reference", "evaluate_perplexity")


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize(
    ("threads", "options"),
    [
        pytest.param(1, ["--cold"], marks=pytest.mark.nightly),
        pytest.param(2, ["--cold"], marks=pytest.mark.nightly),
        ({"default": 1, "calibrate_model": 2}, ["--cold"]),
        ({"default": 2, "quantize_model": 1}, []),
    ],
)
def test_threads_of_every_job_are_those_of_the_config(
    threads: int | dict[str, int], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkout = one_cell(Checkout.make(tmp_path / "quantgrid"))
    checkout.write_config({**checkout.config(), "threads": threads}, "smoke")
    plan = Plan(validation.check(checkout.config()))
    cell = next(cell for cell in plan.cells if cell.quantized)
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE.format(file=str(tmp_path / "noted")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checkout.run("smoke", *options, plan.merge_shards(cell, "docs").outputs["result"])
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    wanted = {f"{rule}.py": plan.threads(rule) for rule in RULES}
    noted = [(name, *rest) for name, *rest in noted if name in wanted]
    assert {name for name, *_ in noted} == wanted.keys()
    assert all(torch == wanted[name] and set(pools) == {wanted[name]} for name, _, torch, pools in noted), noted
    assert (len({parent for _, parent, *_ in noted}) == 1) == ("--cold" not in options), (
        "a warm start, and nothing else, forks jobs from one process"
    )
