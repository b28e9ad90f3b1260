"""Races in results: rows, the table of the page, sentences, and what tables leave out."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from quantgrid.config.cells import Cell
from quantgrid.evaluation.races import Conditions, cut, race
from quantgrid.plan.race_steps import Race
from quantgrid.plan.shards import Shard
from quantgrid.reporting.data import collection, races, records
from quantgrid.reporting.data.evaluation_rows import cell_key
from quantgrid.reporting.figures import races as race_figures
from quantgrid.reporting.page.cell_cards import cell_lines
from quantgrid.reporting.page.race_sections import race_section

CELLS = [Cell("m", "none", name, "channel", "int4") for name in ("rtn", "gptq", "low_rank", "broken")]
LOOKS = (8, 16)
INFO = {"corpus": "race-text", "text_sha256": "ab", "join": "\n\n", "window": 128, "stride": 128, "windows": 40,
        "selection": "sequential", "tokens": 6000, "tokenizer_sha256": "ef", "skip_windows": 4}  # fmt: skip


@pytest.fixture
def raced() -> tuple[Race, dict[str, Any]]:
    """A race of four recipes: two stay, one leaves at the first look, one fails."""
    settings = {"metric": "kl_divergence", "alpha": 0.05, "close": 0.2, "budget": 4.5}
    shards = (Shard(0, 8), Shard(8, 16))
    made = Race("best", "m", "race-text", tuple(CELLS), shards, settings)
    base = [0.1, 0.12, 0.11, 0.13, 0.1, 0.09, 0.12, 0.1] * 2
    factors = {CELLS[0]: (1.08, 0.97), CELLS[1]: (1.0, 1.0), CELLS[2]: (3.0, 3.0)}
    losses: dict[str, Any] = {
        cell.path: cut([value * part for value, part in zip(base, pair * 8)], LOOKS) for cell, pair in factors.items()
    }
    outcome = race({**losses, CELLS[3].path: ["it broke", "it broke"]}, Conditions(LOOKS, 4, close=0.2))
    used = {
        name: [value for part in parts for value in part][: outcome.windows[name]] for name, parts in losses.items()
    }
    bits = {cell.path: {"stored_bits": 4.25, "online_operations": 10 * number} for number, cell in enumerate(CELLS)}
    return made, {
        "looks": [decision.to_dict() for decision in outcome.decisions],
        "losses": used,
        "bits": bits,
        "failed": {CELLS[3].path: "it broke"},
        "pruned": {},
        "corpus": {"corpus": INFO, "dtype": "float32"},
        "survivors": list(outcome.survivors),
        "ended": outcome.decisions[-1].ended,
    }


def test_the_sentence_counts_what_is_not_told_apart_and_what_was_saved(raced):
    made, decision = raced
    assert decision["survivors"] == [CELLS[1].path, CELLS[0].path]
    assert races.summary(made, decision) == (
        "2 of 4 recipes of m are not told apart, best kept with probability >= 0.95 under the test's assumptions; "
        "the others of these are within 20% of the best; 62% of the window evaluations were saved."
    )
    alone = {**decision, "survivors": decision["survivors"][:1], "ended": "one candidate is left"}
    assert races.summary(made, alone).startswith("One of 4 recipes of m is better than all others, best kept")


def test_recipes_that_are_not_raced_are_counted_apart_and_shown_without_a_measurement(raced):
    made, decision = raced
    out = CELLS[3].path
    looks = [{**look, "left": {n: why for n, why in look["left"].items() if n != out}} for look in decision["looks"]]
    pruned = {**decision, "looks": looks, "failed": {}, "pruned": {out: "not raced: predicted error 3"}}
    sentence = races.summary(made, pruned)
    assert sentence.startswith("2 of 3 recipes of m are not told apart, best kept with probability >= 0.95")
    assert sentence.endswith(
        " Left out by the predicted error of their transform and format: 1; there is no guarantee that the best is not "
        "one of them."
    )
    last = races.table(made, pruned).iloc[-1]
    assert (last.mitigation, last.look, last.windows, last.reason) == ("broken", 0, 0, "not raced: predicted error 3")
    assert CELLS[3] not in races.contents(made, pruned)
    page = race_section(made, pruned, {})
    assert [text for text, _ in page["rows"][-1]][3:] == ["0", "–", "–", "–", "0", "not raced: predicted error 3"]


def test_the_cheapest_of_those_that_stay_comes_first(raced):
    assert list(races.cheapest_first(*raced).mitigation) == ["rtn", "gptq"], "fewer online operations"


def test_the_table_has_a_row_per_candidate_with_its_reason(raced):
    table = races.table(*raced).set_index("mitigation")
    assert list(table.index) == ["gptq", "rtn", "low_rank", "broken"]
    assert table.reason["gptq"] == table.reason["rtn"] == races.STAYED and table.reason["broken"] == "it broke"
    assert table.look["low_rank"] == 1 and table.p["low_rank"] < 0.001 and table.windows["low_rank"] == 8
    assert table.difference["gptq"] == 0.0 and table.difference["low_rank"] == pytest.approx(2 * table.loss["gptq"])


def test_rows_of_a_race_have_a_protocol_of_their_own_and_no_place_in_tables(raced):
    made, decision = raced
    evaluations = {cell: {f"race.{made.corpus}": found} for cell, found in races.contents(made, decision).items()}
    frame = collection.records(evaluations)
    assert set(frame.metric.fillna("")) == {"race_kl_divergence", ""} and set(frame["count"].dropna()) == {8}
    assert frame.set_index("mitigation").reason["broken"] == "it broke"
    assert races.protocol(made, decision)["looks"] == [8, 16] and races.protocol(made, decision)["skip_windows"] == 4
    measured = frame[frame.mitigation == "gptq"].assign(metric="perplexity", protocol="")
    kept = records.evaluated(records.tidy(pd.concat([frame, measured])))
    assert set(kept.mitigation) == {"gptq", "broken"} and set(kept.metric) == {"perplexity", ""}


def test_a_cell_that_left_is_listed_with_its_divergence_in_the_race(raced):
    made, decision = raced
    evaluations = {cell: {f"race.{made.corpus}": found} for cell, found in races.contents(made, decision).items()}
    lines = {line["mitigation"]: line for line in cell_lines(records.tidy(collection.records(evaluations)), {})}
    text, value = lines["low_rank"]["divergence"]
    assert text.endswith("), on 8 windows of a race") and value == pytest.approx(0.32625)
    assert lines["broken"]["divergence"][0] == "–" and lines["low_rank"]["perplexity"][0] == "–"
    assert (lines["low_rank"]["dataset"], lines["broken"]["status"]) == ("race-text", "failed")


def test_the_page_shows_the_course_and_all_candidates(raced):
    made, decision = raced
    found = race_section(made, decision, {})
    assert found["image"].startswith("data:image/svg") and len(found["rows"]) == 4
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    assert "The cheapest to run of these is W4A4 INT4 channel RTN" in found["summary"].replace("no transform + ", "")
    assert found["rows"][2][-1][0].startswith("worse than W4A4 INT4 channel GPTQ on 8 windows (p = ")
    (best,) = [reason for reason in found["reasons"] if reason["cell"] == cell_key(CELLS[1])]
    words = "W4A4 INT4 channel GPTQ, change of divergence in nats/token on the windows of the race that both have: "
    assert best["text"].startswith(f"{words}GPTQ instead of RTN −0.00") and best["model"] == "m"
    broken = {**decision, "failed": {**decision["failed"], CELLS[0].path: "it broke later"}}
    assert "RTN" not in str(race_section(made, broken, {})["reasons"])
    by_loss = Race(**{**vars(made), "settings": {**made.settings, "metric": "negative_log_likelihood"}})
    assert race_section(by_loss, decision, {})["reasons"] == []
    course = race_figures.course(made, decision)
    assert list(course[course.cell == CELLS[2].path].windows) == [8]
