"""Races on simulated losses with known means: what is kept, what leaves, and when they end."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from quantgrid.evaluation import races
from quantgrid.evaluation.races import Conditions, cut, decide, prune, race, spent, standing

LOOKS = (8, 16, 32, 64, 128)
RACES = 500


def drawn(seed: int, means: np.ndarray, window: float = 0.15, residual: float = 0.1) -> dict[str, list[float]]:
    """Losses (candidate -> 128 windows) with these true means: log loss = candidate + window +
    residual, normal with these standard deviations."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(0.0, window, LOOKS[-1])
    own = generator.normal(0.0, residual, (len(means), LOOKS[-1]))
    found = means[:, None] * np.exp(shared + own - (window**2 + residual**2) / 2)
    return {f"c{number:03d}": values.tolist() for number, values in enumerate(found)}


def conditions(losses, **changes) -> Conditions:
    return Conditions(**{"looks": LOOKS, "candidates": len(losses), **changes})


def run(losses: dict[str, list[float]], **changes) -> races.Outcome:
    return race({name: cut(values, LOOKS) for name, values in losses.items()}, conditions(losses, **changes))


def spread(seed: int, count: int) -> np.ndarray:
    """True means over a factor of 8, the best first."""
    return np.sort(0.05 * np.exp(np.random.default_rng(10_000 + seed).uniform(0, math.log(8), count)))


def kept(count: int, **losses: float) -> tuple[float, float]:
    """Share of the races that keep the best candidate, and mean share of the windows used."""
    found = [run(drawn(seed, spread(seed, count), **losses)) for seed in range(RACES)]
    share = np.mean([spent(outcome, Conditions(LOOKS, count)) for outcome in found])
    return float(np.mean(["c000" in outcome.survivors for outcome in found])), float(share)


def test_the_best_of_dense_candidates_is_kept_with_few_windows():
    best, share = kept(40)
    assert best >= 0.95 and share <= 0.2


@pytest.mark.parametrize("residual", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_best_is_kept_where_windows_have_heavy_tails(residual):
    best, _ = kept(20, window=1.0, residual=residual)
    assert best >= 0.95


@pytest.mark.parametrize("residual", [0.0, 0.1])
def test_none_leaves_where_all_are_equal(residual):
    """With and without noise; among many candidates one is far above the least by chance."""
    found = [run(drawn(seed, np.full(20, 0.1), residual=residual)) for seed in range(RACES)]
    assert np.mean([not any(decision.left for decision in outcome.decisions) for outcome in found]) >= 0.95


def test_the_level_is_shared_by_all_looks_and_all_ordered_pairs():
    assert Conditions(LOOKS, 11, alpha=0.05).level == pytest.approx(0.05 / 550)
    assert Conditions((8,), 1).level == 0.05


def test_a_standing_is_the_paired_t_test():
    from scipy import stats

    own, leader = np.random.default_rng(0).gamma(2.0, 0.1, (2, 20))
    found = standing(own.tolist(), leader.tolist(), 0.01)
    wanted = stats.ttest_rel(own, leader, alternative="greater")
    assert (found.difference, found.p) == (pytest.approx((own - leader).mean()), pytest.approx(wanted.pvalue))
    assert found.upper == pytest.approx(wanted.confidence_interval(0.99).low * -1 + 2 * found.difference, rel=1e-6)
    assert (found.mean, found.median) == (pytest.approx(own.mean()), pytest.approx(np.median(own)))


def test_a_difference_that_one_window_makes_decides_nothing_on_few_windows():
    """With and without the outlier the test alone would reject."""
    leader = [0.1] * 8
    own = [0.2 + 0.001 * number for number in range(7)]
    assert standing([*own, 0.21], leader, 0.001).p < 0.001
    assert standing([*own, 9.0], leader, 0.001).p == 1.0
    assert standing([*own, 0.21] * 2, leader * 2, 0.001).p < 0.001
    assert standing([0.2], [0.1], 0.05).p == 1.0 and standing([0.2], [0.1], 0.05).upper is None


def test_equal_candidates_are_close_and_none_leaves():
    same = [0.1, 0.2, 0.15, 0.3] * 32
    outcome = run({"a": same, "b": list(same), "c": [value * 2 for value in same]})
    assert outcome.survivors == ("a", "b") and outcome.decisions[-1].ended == races.CLOSE
    assert outcome.windows == {"a": 8, "b": 8, "c": 8} and len(outcome.decisions) == 1
    assert "worse than a on 8 windows" in outcome.decisions[0].left["c"]


def test_a_race_ends_when_one_is_left_and_reads_no_further_shard():
    first, second = ([value * factor for value in (0.1, 0.11, 0.12, 0.1, 0.1, 0.1, 0.13, 0.1)] for factor in (1.0, 2.0))
    outcome = race({"a": [first], "b": [second]}, Conditions(LOOKS, 2))
    assert (outcome.survivors, outcome.decisions[0].ended) == (("a",), races.ONE_LEFT)
    assert spent(outcome, Conditions(LOOKS, 2)) == 8 / 128


def test_candidates_that_no_window_tells_apart_stay_to_the_end():
    outcome = run(drawn(1, np.array([0.1, 0.101]), residual=0.5), close=0.0)
    assert set(outcome.survivors) == {"c000", "c001"} and outcome.decisions[-1].ended == races.ALL_WINDOWS
    assert outcome.windows == {"c000": 128, "c001": 128} and spent(outcome, Conditions(LOOKS, 2)) == 1.0


def test_a_candidate_that_fails_leaves_with_its_reason_and_a_leader_that_fails_changes_the_leader():
    losses = {
        name: cut(values, LOOKS) for name, values in drawn(2, np.array([0.1, 0.103, 0.106]), residual=0.3).items()
    }
    losses["c000"][1] = "perplexity: the loss of window 9 is NaN or infinite"
    outcome = race(losses, Conditions(LOOKS, 3, close=0.0))
    assert outcome.decisions[0].survivors[0] in losses and "c000" not in outcome.survivors
    assert outcome.decisions[1].left["c000"] == losses["c000"][1] and outcome.windows["c000"] == 8
    assert "c000" not in outcome.decisions[1].standings
    alone = race({name: ["broken"] for name in "ab"}, Conditions(LOOKS, 2))
    assert alone.survivors == () and alone.decisions[0].ended == races.NONE_LEFT


def test_candidates_whose_predicted_error_is_far_above_the_smallest_are_not_raced():
    found = prune({"a": 0.1, "b": 0.2, "c": 0.21}, 2)
    assert found == {"c": "not raced: predicted error 0.21, more than 2 times the smallest, 0.1"}
    assert prune({"a": 0.0, "b": 1e-9}, 2).keys() == {"b"} and prune({}, 2) == {}


def test_a_candidate_added_later_is_judged_from_stored_losses():
    """Decisions depend on the losses and the conditions alone; more candidates share the level."""
    losses = drawn(3, spread(3, 12))
    before, added = run(losses), {**losses, "new": [0.99 * value for value in losses["c000"]]}
    now = run(added)
    assert run(added) == now and "new" in now.survivors
    assert conditions(added).level < conditions(losses).level
    assert before.windows.keys() < now.windows.keys()


def test_a_decision_is_ready_for_json():
    found = decide({"a": [0.1, 0.2], "b": [0.3, 0.1]}, {"c": "broken"}, Conditions((2, 4), 3))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["survivors"] == ["a", "b"] and content["left"] == {"c": "broken"} and content["windows"] == 2
    assert content["standings"]["b"]["difference"] == pytest.approx(0.05)
