"""Claims: planted effects are found and their opposites refuted, noise stays undecided, and
pairing, Holm and the bootstrap do what they say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from checkouts import ROOT
from quantgrid.config import validation
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.claims import contrasts, findings, verdicts
from quantgrid.reporting.data import paired
from quantgrid.reporting.data.records import AXES
from quantgrid.reporting.page import report

SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 64,
    "intermediate_size": 64,
    "layers": 1,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 32,
    "vocabulary": 8,
}
CONFIG = {
    "models": {
        "large": {"source": "hub", "id": "a/l", "revision": "main", "shape": {**SHAPE, "layers": 9}},
        "small": {"source": "hub", "id": "a/s", "revision": "main", "shape": SHAPE},
    },
    "transforms": {"turn": {"method": "random_hadamard", "seeds": [0, 1]}},
    "mitigations": {"lr": {"method": "low_rank", "rank": 4}},
    "formats": {},
}
# what all cells share, far wider than the effects
WINDOWS = np.random.default_rng(0).normal(3.0, 0.5, 32)


def loss(effect: float, seed: int, spread: float = 0.01) -> np.ndarray:
    return WINDOWS + effect + np.random.default_rng(seed).normal(0, spread, 32)


def cell(
    effect: float,
    model: str = "small",
    transform: str = "none",
    mitigation: str = "rtn",
    granularity: str = "channel",
    format: str = "int4",
    bits: float = 4.0,
) -> dict:
    return {**dict(zip(AXES, (model, transform, mitigation, granularity, format))), "effect": effect, "bits": bits}


def tables(cells: list[dict], **changes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(records, items) of cells whose losses lie ``effect`` above those of full precision."""
    rows, items = [], []
    for number, given in enumerate(cells):
        common = {"cell": str(number), **{axis: given[axis] for axis in AXES}, "status": "ok", "reason": ""}
        values = loss(given["effect"], number, **changes)
        rows += [
            {**common, "metric": "negative_log_likelihood", "dataset": "docs", "value": values.mean()},
            {**common, "metric": "bits_per_weight", "dataset": "", "value": given["bits"]},
        ]
        place = {"cell": str(number), "metric": "negative_log_likelihood", "dataset": "docs"}
        items += [{**place, "item": at, "value": value} for at, value in enumerate(values)]
    return pd.DataFrame(rows), pd.DataFrame(items)


def full(model: str) -> dict:
    return cell(0.0, model, "none", "none", "-", "bf16")


def evaluated(claim: dict, cells: list[dict], equal: dict[str, float] | None = None, **changes) -> pd.DataFrame:
    return verdicts.evaluate({"c": {"statement": "s", **claim}}, equal or {}, *tables(cells, **changes), CONFIG)


def with_divergences(records: pd.DataFrame, items: pd.DataFrame, shift: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same cells with divergences that are their losses above ``WINDOWS`` plus ``shift``."""
    values = items[items.metric == "negative_log_likelihood"]
    other = values.assign(metric="kl_divergence", value=values.value - WINDOWS[values.item] + shift)
    return records, pd.concat([items, other])


GPTQ_OVER_LOW_RANK = {
    "terms": [{"weight": 1, "mitigation": "gptq"}, {"weight": -1, "mitigation": "low_rank"}],
    "below": 0,
}


def test_the_shipped_claims_are_valid_and_none_is_missing():
    found = contrasts.read()
    assert len(found) == 16 and all(claim["paper"] for claim in found.values())


@pytest.mark.parametrize(
    ("gptq", "low_rank", "verdict"), [(0.1, 0.2, "holds"), (0.2, 0.1, "does not hold"), (0.1, 0.1001, "undecided")]
)
def test_a_planted_effect_is_found(gptq, low_rank, verdict):
    (row,) = evaluated(
        GPTQ_OVER_LOW_RANK, [full("small"), cell(gptq, mitigation="gptq"), cell(low_rank, mitigation="lr")]
    ).itertuples()
    assert row.verdict == row.outcome == verdict and row.low <= row.effect <= row.high and row.count == 32
    # 'lr' is known by its method
    assert row.effect == pytest.approx(gptq - low_rank, abs=0.01) and row.cells == "1 2"
    assert row.high - row.low < 0.02  # paired: the spread that the windows share would give 0.35


def test_every_and_some():
    cells = [
        cell(0.1, mitigation="gptq"),
        cell(0.2, mitigation="lr"),
        cell(0.4, transform="turn-s0", mitigation="gptq"),
        cell(0.2, transform="turn-s0", mitigation="lr"),
    ]
    assert set(evaluated(GPTQ_OVER_LOW_RANK, cells).verdict) == {"does not hold"}
    some = evaluated({**GPTQ_OVER_LOW_RANK, "across": "some"}, cells)
    assert set(some.verdict) == {"holds"} and list(some.outcome) == ["holds", "does not hold"]
    assert verdicts.verdict(["does not hold", "undecided"], "some") == "undecided"
    assert verdicts.verdict(["holds", "undecided"], "every") == "undecided"
    assert verdicts.verdict(["does not hold"] * 2, "some") == "does not hold"


def test_axes_that_no_term_names_are_shared_and_where_selects():
    cells = [
        cell(0.1, transform=transform, mitigation=mitigation, granularity=granularity)
        for transform in ("none", "turn-s0", "turn-s1")
        for mitigation in ("gptq", "lr")
        for granularity in ("channel", "group-16")
    ]
    assert len(evaluated(GPTQ_OVER_LOW_RANK, cells)) == 6
    assert (
        len(
            evaluated(
                {**GPTQ_OVER_LOW_RANK, "where": {"transform": "random_hadamard", "granularity": "channel"}}, cells
            )
        )
        == 2
    )
    assert len(evaluated({**GPTQ_OVER_LOW_RANK, "where": {"transform": "turn-s1"}}, cells)) == 2
    either = {
        "terms": [
            {"weight": 1, "transform": "none", "mitigation": "gptq"},
            {"weight": -1, "transform": "any", "mitigation": "lr"},
        ],
        "below": 0,
    }
    assert len(evaluated(either, cells)) == 6  # granularities are shared, transforms are not


def test_a_ladder_compares_neighbours_that_are_there():
    cells = [
        cell(0.5, granularity="channel", bits=4.0),
        cell(0.3, granularity="group-64", bits=4.25),
        cell(0.1, granularity="group-16", bits=5.0),
        cell(0.2, granularity="group-32", format="mxfp4"),
    ]
    ladder = {
        "ladder": {"granularity": ["tensor", "channel", "group-64", "group-32", "group-16"]},
        "where": {"format": "int4"},
    }
    better = evaluated({**ladder, "below": 0}, cells)
    assert list(better.cells) == ["1 0", "2 1"] and set(better.verdict) == {"holds"}
    cost = evaluated({**ladder, "above": 0, "metric": "bits_per_weight"}, cells)
    assert list(cost.effect) == [0.25, 0.75] and set(cost.verdict) == {"holds"} and (cost.low == cost.high).all()


def test_a_contrast_of_four_cells_between_models():
    claim = {
        "terms": [
            {"weight": 1, "model": "larger"},
            {"weight": -1, "model": "larger", "baseline": True},
            {"weight": -1, "model": "smaller"},
            {"weight": 1, "model": "smaller", "baseline": True},
        ],
        "below": 0,
    }
    cells = [
        full("large"),
        cell(0.1, "large"),
        full("small"),
        cell(0.4, "small"),
        cell(0.9, "small", mitigation="gptq"),
    ]
    (row,) = evaluated(claim, cells).itertuples()
    assert row.model == "small, large" and row.verdict == "holds" and row.effect == pytest.approx(-0.3, abs=0.01)


def test_a_threshold_other_than_zero():
    claim = {"terms": [{"weight": 1, "format": "int4_sym"}, {"weight": -1, "format": "int4"}], "above": 0.03}
    for effect, verdict in ((0.1, "holds"), (0.001, "does not hold"), (0.031, "undecided")):
        (row,) = evaluated(claim, [cell(0.2 + effect, format="int4_sym"), cell(0.2)]).itertuples()
        assert row.verdict == verdict, effect


def test_an_undecided_difference_within_the_margin_is_equal():
    equal = {"negative_log_likelihood": 0.02}
    for effect, outcome in ((0.1001, "equal"), (0.115, "holds"), (0.2, "holds"), (0.08, "does not hold")):
        (row,) = evaluated(
            GPTQ_OVER_LOW_RANK, [cell(0.1, mitigation="gptq"), cell(effect, mitigation="lr")], equal
        ).itertuples()
        assert row.verdict == row.outcome == outcome and row.margin == 0.02, effect
    wide = [cell(0.1, mitigation="gptq"), cell(0.1001, mitigation="lr")]
    (row,) = evaluated(GPTQ_OVER_LOW_RANK, wide, equal, spread=0.2).itertuples()
    assert row.verdict == "undecided" and row.high - row.low > 0.04
    threshold = {"terms": [{"weight": 1, "format": "int4_sym"}, {"weight": -1, "format": "int4"}], "above": 0.001}
    (row,) = evaluated(threshold, [cell(0.1, format="int4_sym"), cell(0.1)], equal).itertuples()
    assert row.verdict == "undecided" and pd.isna(row.margin)  # equality is about zero alone


def test_the_error_of_an_equality_is_at_most_its_level():
    """Simulated: sides that differ by the margin, and equal sides, over 32 windows."""
    random, found = np.random.default_rng(3), {0.0: 0, 0.02: 0}
    for difference in found:
        for _ in range(60):
            _, low, high, p = paired.estimate([random.normal(difference, 0.02, 32)])
            row = SimpleNamespace(
                reason="", p_adjusted=max(p, 0.05), low=low, high=high, threshold=0.0, margin=0.02, side="below"
            )
            found[difference] += verdicts.outcome(row) == "equal"
    assert found[0.0] > 55 and found[0.02] <= 5


def test_claims_about_losses_are_tested_on_the_divergence_too():
    """Its margin is a share of the mean divergence; each metric has a verdict."""
    made = with_divergences(*tables([cell(0.1, mitigation="gptq"), cell(0.101, mitigation="lr")]), 0.0)
    equal = {"negative_log_likelihood": 0.02, "kl_divergence": 0.2}
    found = verdicts.evaluate({"c": {"statement": "s", **GPTQ_OVER_LOW_RANK}}, equal, *made, CONFIG)
    loss, divergence = found.itertuples()
    assert (loss.metric, divergence.metric) == ("negative_log_likelihood", "kl_divergence")
    assert loss.effect == pytest.approx(divergence.effect) and divergence.margin == pytest.approx(0.02, rel=0.1)
    named = {"c": {"statement": "s", "metric": "bits_per_weight", **GPTQ_OVER_LOW_RANK}}
    assert set(verdicts.evaluate(named, equal, *made, CONFIG).metric) == {"bits_per_weight"}


def test_the_detectable_difference_is_decided_in_four_of_five_cases():
    """Simulated: normal differences over 32 windows, one comparison."""
    random, decided, detectable = np.random.default_rng(4), 0, []
    width = verdicts.detectable_widths(1)
    for _ in range(200):
        sample = random.normal(0.0, 1.0, 32)
        _, low, high, _ = paired.estimate([sample])
        detectable.append((high - low) * width)
    size = float(np.mean(detectable))
    for _ in range(200):
        decided += stats.ttest_1samp(random.normal(size, 1.0, 32), 0.0).pvalue < 0.05
    assert 0.7 < decided / 200 < 0.9 and verdicts.detectable_widths(40) > 1.4 * width


def test_verdicts_of_claims_with_equal_comparisons():
    assert verdicts.verdict(["equal", "equal"], "every") == "equal" == verdicts.verdict(["equal"], "some")
    assert verdicts.verdict(["holds", "equal"], "every") == "holds in part"
    assert verdicts.verdict(["holds", "equal", "undecided"], "every") == "undecided"
    assert verdicts.verdict(["does not hold", "equal"], "every") == "does not hold"
    assert verdicts.verdict(["does not hold", "equal"], "some") == "does not hold"
    assert verdicts.verdict(["holds", "equal"], "some") == "holds"


@pytest.mark.parametrize(
    ("equal", "message"),
    [
        ({"perplexity": 0.02}, "equal: unknown metric 'perplexity'"),
        ({"kl_divergence": 5}, r"equal.kl_divergence: needs a number between 0 and 1, a share of the mean divergence"),
        ({"negative_log_likelihood": True}, "needs a number between 0 and 1, a difference in nats per token"),
    ],
)
def test_margins_that_mean_nothing_are_refused(tmp_path, equal, message):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"equal": equal, "claims": {}}))
    with pytest.raises(ConfigError, match=message):
        contrasts.margins(tmp_path / "claims.yaml")
    assert contrasts.margins() == {"negative_log_likelihood": 0.02, "kl_divergence": 0.05}


def test_a_claim_that_nothing_fits_is_said_to_be_unmeasured():
    (row,) = evaluated(GPTQ_OVER_LOW_RANK, [cell(0.1, mitigation="gptq")]).itertuples()
    assert row.verdict == "not measured" and pd.isna(row.effect)


def test_holm_is_that_of_the_textbook_and_bounds_false_findings():
    assert np.allclose(paired.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9]) == [0.9] and paired.holm([0.5, 0.6]) == [1.0, 1.0]
    cells = [
        cell(0.1, transform=f"t{number}", mitigation=mitigation)
        for number in range(40)
        for mitigation in ("gptq", "low_rank")
    ]
    config_transforms = {f"t{number}": {"method": "none"} for number in range(40)}
    found = verdicts.evaluate(
        {"c": {"statement": "s", **GPTQ_OVER_LOW_RANK}}, {}, *tables(cells), {**CONFIG, "transforms": config_transforms}
    )
    # 40 comparisons of equals
    assert (found.p < 0.05).sum() >= 1 and set(found.outcome) == {"undecided"}


def test_the_interval_is_that_of_a_t_test_on_normal_differences():
    sample = np.random.default_rng(5).normal(0.1, 0.02, 64)
    effect, low, high, p = paired.estimate([sample], 0.0)
    expected = stats.ttest_1samp(sample, 0.0)
    assert effect == pytest.approx(sample.mean()) and p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert low == pytest.approx(interval.low, abs=0.001) and high == pytest.approx(interval.high, abs=0.001)
    assert paired.estimate([sample], 0.0) == (effect, low, high, p)
    other = np.random.default_rng(6).normal(-0.1, 0.02, 40)
    assert paired.estimate([sample, other], 0.0)[3] == pytest.approx(
        stats.ttest_ind(sample, -other, equal_var=False).pvalue
    )
    assert paired.certain(0.3) == (0.3, 0.3, 0.3, 0.0) and paired.estimate([np.zeros(9)], 0.0) == paired.certain(
        0.0
    ) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"term": []}, "unknown key 'term' - did you mean 'terms'"),
        ({"above": 0}, "one of below and above"),
        ({"across": "most"}, "'every' or 'some'"),
        ({"where": {"formats": "int4"}}, "unknown key 'formats' - did you mean 'format'"),
        ({"ladder": {"format": []}}, "one of terms, contrasts and ladder"),
    ],
)
def test_bad_claims_are_refused(tmp_path, change, message):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": {"c": {"statement": "s", **GPTQ_OVER_LOW_RANK, **change}}}))
    with pytest.raises(ConfigError, match=message):
        contrasts.read(path)


def test_the_report_shows_verdicts_and_comparisons(tmp_path):
    found = evaluated(GPTQ_OVER_LOW_RANK, [cell(0.1, mitigation="gptq"), cell(0.2, mitigation="lr"), full("large")])
    found.to_csv(tmp_path / "claims.csv", index=False)
    (claim,) = findings.read(tmp_path / "claims.csv")
    assert {model: given["verdict"] for model, given in claim["verdicts"].items()} == {
        "small": "holds",
        "large": "not measured",
    }
    (line,) = claim["comparisons"]
    assert (
        line["cells"] == "0 1"
        and claim["summary"] == "holds on 1, not measured on 1"
        and findings.models([claim]) == ["small", "large"]
    )
    text = report.build([], {"claims": [claim]})
    assert (
        'href="#findings"' in text and 'class="verdict holds"' in text and "none, channel, int4: + gptq; − lr" in text
    )
    assert f"1 of 1 hold<br>{line['shown']}" in text and "Verdicts over all models: holds 1." in text


def test_a_claim_about_two_models_stands_with_the_larger_one(tmp_path):
    terms = [{"weight": 1, "model": "larger"}, {"weight": -1, "model": "smaller"}]
    evaluated({"terms": terms, "below": 0}, [cell(0.1, "large"), cell(0.4, "small")]).to_csv(
        tmp_path / "claims.csv", index=False
    )
    (claim,) = findings.read(tmp_path / "claims.csv")
    assert list(claim["verdicts"]) == ["large"] and claim["verdicts"]["large"]["against"] == "small"


def test_effects_are_shown_as_changes_of_perplexity_where_that_says_something():
    loss = "negative_log_likelihood"
    assert findings.shown(np.log(0.8), np.log(0.75), np.log(0.85), loss) == "−20.0 % (−25.0 to −15.0)"
    assert findings.shown(np.log(5.0), np.log(4.0), np.log(6.0), loss) == "+400 % (+300 to +500)"
    assert findings.shown(7.0, 6.0, 8.0, loss) == "+7.00 nats (+6.00 to +8.00)"
    assert findings.shown(0.25, 0.25, 0.25, "bits_per_weight") == "+0.25"
    assert findings.shown(-0.0123, -0.02, -0.001, "kl_divergence") == "−0.0123 nats (−0.02 to −0.001)"


def test_both_metrics_of_a_claim_are_findings(tmp_path):
    made = with_divergences(*tables([cell(0.1, mitigation="gptq"), cell(0.2, mitigation="lr"), full("large")]), 0.0)
    claims = {"c": {"statement": "s", **GPTQ_OVER_LOW_RANK}}
    verdicts.evaluate(claims, {"kl_divergence": 0.05}, *made, CONFIG).to_csv(tmp_path / "claims.csv", index=False)
    loss, divergence = findings.read(tmp_path / "claims.csv")
    assert (loss["statement"], divergence["statement"]) == ("s", "s (by divergence)")
    assert {model: given["verdict"] for model, given in loss["verdicts"].items()} == {
        "small": "holds",
        "large": "not measured",
    }
    assert set(divergence["verdicts"]) == {"small"} and divergence["comparisons"][0]["margin"]
    assert float(divergence["comparisons"][0]["detectable"]) < 0.02


def test_every_name_in_the_shipped_claims_is_known():
    from quantgrid.config import registry
    from quantgrid.schemes import PRESETS

    paper = validation.read(ROOT / "config" / "paper.yaml")
    known = {
        *registry.TRANSFORMS,
        *registry.MITIGATIONS,
        *PRESETS,
        *paper["formats"],
        *paper["mitigations"],
        *contrasts.SIZES,
        "any",
    }
    for claim in contrasts.read().values():
        terms = [claim.get("where", {}), *(term for contrast in contrasts.contrasts(claim, []) for term in contrast)]
        for axis in ("transform", "mitigation", "format", "model"):
            used = [
                value
                for term in terms
                if axis in term
                for value in (term[axis] if isinstance(term[axis], list) else [term[axis]])
            ]
            assert set(used) <= known, (claim["statement"], axis)
