"""Shards of windows: their boundaries, and what more windows add to a plan."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_cases import content, naming, plan, steps
from quantgrid.plan.shards import Shard, shards

pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.mark.parametrize(
    ("windows", "first", "batch_size", "expected"),
    [
        (8, 8, 8, "0-8"),
        (16, 8, 8, "0-8 8-16"),
        (128, 8, 8, "0-8 8-16 16-32 32-64 64-128"),
        (20, 8, 8, "0-8 8-16 16-20"),
        (16, 32, 8, "0-16"),
        (32, 10, 8, "0-16 16-32"),
        (5, 1, 8, "0-5"),
        (None, 8, 8, "0-all"),
    ],
)
def test_shards_double_in_whole_batches(windows, first, batch_size, expected):
    assert " ".join(map(str, shards(windows, first, batch_size))) == expected


@given(st.integers(1, 3000), st.integers(1, 100), st.integers(1, 20), st.integers(0, 3000))
def test_more_windows_keep_all_shards_but_a_partial_last_one(windows, first, batch_size, more):
    found, later = shards(windows, first, batch_size), shards(windows + more, first, batch_size)
    assert found[0].start == 0 and found[-1].stop == windows
    assert all(one.stop == other.start and one.stop % batch_size == 0 for one, other in pairwise(found))
    assert set(found[:-1]) <= set(later)
    assert sum(shard.size for shard in later) == windows + more


def sharded(windows: int) -> dict:
    config = content()
    config["evaluation"] = {"shard_windows": 8}
    config["corpora"]["docs"]["windows"] = windows
    return config


def test_more_windows_add_shards_and_change_none():
    """Only the merge follows the number of windows."""
    before, now = steps(sharded(8)), steps(sharded(16))
    added = now.keys() - before.keys()
    assert {step for step in before if now[step] != before[step]} == {
        step for step in naming("docs") if step[0] == "merge_shards"
    } | {step for step in before if step[0] == "export_model"}
    assert {(rule, *rest) for rule, *rest in added} == {
        (rule, *rest[:-1], "8-16")
        for rule, *rest in before
        if rule in ("evaluate_reference", "evaluate_perplexity")
        if "docs" in rest
    }


def test_a_shard_reads_all_windows_of_the_corpus_and_the_reference_of_its_own():
    made = plan(sharded(16))
    cell = made.studies["formats"][1]
    step = made.evaluate_perplexity(cell, "docs", Shard(8, 16))
    assert step.spec["shard"] == {"start": 8, "stop": 16} and "windows" not in step.spec
    assert "/8-16/" in step.inputs["reference"] and "/docs/8-16/" in step.outputs["result"]
    assert step.inputs["windows"] == made.measure_residual_error(cell, "docs").inputs["windows"]
    assert "windows" not in made.tokenize_all("tiny", "docs").spec["corpus"]
    merged = made.merge_shards(cell, "docs")
    assert list(merged.inputs) == ["0-8", "8-16"] and merged.spec["windows"] == 16 and "compute" not in merged.spec
    assert made.inputs("merge_shards")(merged.wildcards)["shards"] == list(merged.inputs.values())
