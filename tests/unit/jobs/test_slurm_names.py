"""Names of Slurm jobs: rule, model and cell, and queries that find the jobs by other means than one name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import pytest

from quantgrid.jobs.slurm_names import for_all_jobs, title

PLUGIN = "2.8.0"  # version of the executor plugin whose functions workflow/rules/internals.smk replaces
CELL = {"model": "m", "transform": "none", "mitigation": "gptq", "granularity": "channel", "format": "int4"}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([("calibrate_model", {"model": "m", "calibration": "default", "key": "0"})], "calibrate_model:m/default"),
        ([("quantize_model", {**CELL, "key": "0"})], "quantize_model:m/none/gptq/channel/int4"),
        ([("evaluate_perplexity", {"corpus": "text", **CELL})], "evaluate_perplexity:m/none/gptq/channel/int4"),
        (
            [("quantize_model", CELL), ("evaluate_perplexity", {**CELL, "corpus": "text", "key": "1"})],
            "cell:m/none/gptq/channel/int4",
        ),
        (
            [("quantize_model", {**CELL, "format": f"int{n}"}) for n in (8, 4, 3)],
            "quantize_model:m/none/gptq/channel/int3+2",
        ),
        ([("all", {})], "all:all"),
    ],
)
def test_a_job_is_called_after_what_it_does(steps: list, name: str):
    assert title(steps) == name and title(reversed(steps)) == name


@pytest.mark.parametrize(("query", "option"), [("query_job_status_squeue", " --me"), ("query_job_status_sacct", "")])
def test_the_plugin_asks_for_all_jobs_of_the_user(query: str, option: str):
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm")
    assert version("snakemake-executor-plugin-slurm") == PLUGIN
    own: Callable[[str], str] = getattr(plugin, query)
    assert for_all_jobs(own, option)("1-2-3") == own("1-2-3").removesuffix(" --name 1-2-3") + option
    assert "--name" not in for_all_jobs(own, option)("1-2-3")


def test_a_query_of_another_form_is_refused():
    with pytest.raises(ValueError, match="does not end with --name"):
        for_all_jobs(lambda run: f"squeue --name={run} --noheader")
