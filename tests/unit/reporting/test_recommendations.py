"""Recommendations: in order of divergence, within the bits and one kind of deployment, with what is as
good and cheaper, and the share of every axis."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from in_process import run_script
from overview_cases import CELLS, results
from quantgrid.config.deployments import DEPLOYMENTS
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import write_record
from quantgrid.reporting.claims import headlines, reasons
from quantgrid.reporting.claims.recommendation import candidates, kinds, limit, recommend
from quantgrid.reporting.claims.recommendation_text import text

RECORDS, ITEMS = results()
ANY = DEPLOYMENTS["weights-activations+online"]


def ranked(bits, kind=ANY, records=RECORDS):
    return recommend(candidates(records, {}, "m"), ITEMS, kind, bits)


def test_recommendations_are_in_order_and_within_the_bits():
    found = ranked(4.3)
    assert list(found.cell) == ["3", "4", "2", "1"] and (found.bits <= 4.3).all()
    # 3 and 4 differ by less than their noise
    assert list(found.indistinguishable) == [True, True, False, False]
    assert found.relative[0] == pytest.approx(np.exp(0.1), rel=0.01)
    assert (found.low <= found.difference).all() and (found.difference <= found.high).all()
    # paired
    assert found.difference[2] == pytest.approx(0.1, abs=0.01) and found.high[2] - found.low[2] < 0.02


def test_kinds_of_deployment_never_share_a_list():
    cells = candidates(RECORDS, {}, "m")
    assert [kind.name for kind in kinds(cells)] == [
        "weights",
        "weights+online",
        "weights-activations",
        "weights-activations+online",
    ]
    lists = {kind.name: list(recommend(cells, ITEMS, kind, 16).cell) for kind in kinds(cells)}
    assert lists["weights"] == ["7", "8"] and lists["weights+online"] == ["9", "7", "8"]
    assert lists["weights-activations"] == ["6", "4", "5", "1"]
    assert set(lists["weights-activations+online"]) == {"1", "2", "3", "4", "5", "6"}


def test_the_terminal_names_the_best_and_the_cheapest_of_what_is_as_good():
    shown = text(ranked(4.3), "title", 3)
    assert shown.count("*") == 3 and "W4A4 INT4 group-64 turn + GPTQ" in shown and "Holm over 3" in shown
    assert "INT4 channel RTN" not in shown
    assert shown.endswith("W4A4 INT4 group-64 fold + RTN: 0 online operations per token, 4.250 bits.")
    assert "Of the 2 with an asterisk the cheapest to run is" in shown
    alone = ranked(4.3, records=RECORDS[RECORDS.cell.isin(["b", "2"])])
    assert text(alone, "title", 9).endswith("W4A4 INT4 channel turn + GPTQ is better than all others.")


@pytest.mark.parametrize(
    ("model", "bits", "kind", "corpus", "message"),
    [
        ("", 5, "weights", "", "MODEL: none is named; name one, as in MODEL=m; there are m"),
        ("n", 5, "weights", "", "MODEL: unknown model 'n'"),
        ("m", 3.5, "weights", "", "BITS: no cell of 'm' for weights has at most 3.5 .*; the smallest has 4.25"),
        ("m", 5, "weights", "wiki", "CORPUS: 'm' was measured on docs; name one of them, as in CORPUS=docs"),
        ("m", 5, "activations", "", "DEPLOYMENT: no cell of 'm' is for activations .*; there are weights, weights"),
    ],
)
def test_what_cannot_be_answered_is_said(model, bits, kind, corpus, message):
    with pytest.raises(ConfigError, match=message):
        recommend(candidates(RECORDS, {}, model, corpus), ITEMS, DEPLOYMENTS[kind], bits)


@pytest.mark.parametrize(("given", "message"), [("", "no limit is named.*BITS=4.5; .* 4.02 to 9"), ("few", "'few' is")])
def test_a_limit_that_is_missing_or_no_number_is_said_with_what_is_there(given, message):
    with pytest.raises(ConfigError, match=f"BITS: .*{message}"):
        limit(given, candidates(RECORDS, {}, "m"))


def test_headlines_have_a_line_per_kind_and_budget_with_costs_in_words_and_no_recipe_twice():
    found = headlines.headlines(RECORDS, ITEMS, {})
    assert headlines.first_budget(found) == "5"
    shown = {line["kind"]: line for line in found if line["budget"] == "5"}
    assert [line["cell"] for line in shown.values()] == ["7", "9", "4", "3"]
    assert {line["budget"] for line in found} == {"4.25", "4.5", "5", "6.5", "8.5", "inf"}
    line = shown["weights-activations+online"]
    assert line["recipe"] == "W4A4 INT4 group-64 turn + GPTQ" and line["bits"] == ("4.25", 4.25)
    assert (
        line["cheaper"][0] == "W4A4 INT4 group-64 fold + RTN: 4.25 bits, 0 instead of 500 online operations per token"
    )
    assert shown["weights"]["cheaper"][0] == "–" and shown["weights"]["accuracy"][0] == "–"
    assert "+10.5 %" in line["perplexity"][0] and line["divergence"][0].startswith("0.1")
    best = {line["kind"]: line["cell"] for line in found if line["budget"] == "inf"}
    assert best["weights-activations"] == "6" and "weights-activations+online" not in best


def test_reasons_are_paired_comparisons_with_the_plain_value_of_each_axis():
    lines = [line for line in headlines.headlines(RECORDS, ITEMS, {}) if line["budget"] == "5"]
    first, second = reasons.reasons(lines, RECORDS, ITEMS, {})
    assert first["text"].startswith("W4A16 g64 turn + GPTQ, change of divergence in nats/token: turn instead of no")
    assert "turn instead of no transform −0.0100 (" in first["text"] and "33% less" in first["text"]
    assert "RTN" not in first["text"]  # turn + RTN was not measured
    assert "group-64 instead of channel −0.100 (" in second["text"] and "50% less" in second["text"]
    assert reasons.sentence("5", reasons.Measured(axes(), {"5": np.ones(4)}, {})) == ""


def axes():
    return RECORDS.drop_duplicates("cell").set_index("cell")


def test_the_command_answers_from_a_results_folder(tmp_path):
    (tmp_path / "studies").mkdir()
    RECORDS.to_csv(tmp_path / "results.csv", index=False)
    ITEMS.to_parquet(tmp_path / "studies" / "s.items.parquet")
    write_record("collect_results", [tmp_path / "results.csv"])
    write_record("collect_study", [tmp_path / "studies" / "s.items.parquet"])
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"results_dir": str(tmp_path)}))
    words = ("--configfile", config, "--model", "m")
    done = run_script("recommend", *words, "--bits", "4.6")
    assert done.returncode == 0 and done.stdout.count("at most 4.6 bits per weight") == 4, done.stderr
    assert "weights only, no online operations, at most 4.6 bits per weight: 2 recipes" in done.stdout
    done = run_script("recommend", *words, "--bits", "4.6", "--deployment", "weights")
    assert done.stdout.splitlines()[2].startswith("1*") and done.stdout.count("at most") == 1
    done = run_script("recommend", *words, "--bits", "3")
    assert done.returncode == 1 and done.stderr.startswith("recommend: BITS")
    done = run_script("recommend", *words, "--bits", "4", "--deployment", "weight")
    assert done.returncode == 1 and "unknown deployment 'weight' - did you mean 'weights'?" in done.stderr
    (tmp_path / "results.csv").write_text((tmp_path / "results.csv").read_text().replace("4.", "3.", 1))
    done = run_script("recommend", *words, "--bits", "4.6")
    assert (
        done.returncode == 1 and "results.csv: its content has changed: not what collect_results wrote" in done.stderr
    )


def test_every_cell_is_on_a_list_of_its_kind():
    listed = {cell for kind in DEPLOYMENTS.values() if kind.rounded != "activations" for cell in ranked(16, kind).cell}
    assert listed == set(CELLS) - {"b"}
