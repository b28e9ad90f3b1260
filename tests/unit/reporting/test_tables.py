"""Tables: arrangement, marks for the best, failed and missing cells, and what the files hold."""

import csv
import math

import pandas as pd
import pytest
from scipy import stats

from quantgrid.ground.errors import ConfigError
from quantgrid.reporting import style
from quantgrid.reporting.data import records as study_records
from quantgrid.reporting.tables import study_tables, writers

BASELINE = {"transform": "none", "mitigation": "none", "granularity": "-", "format": "bf16"}


def record(cell, value=None, stderr=None, metric="perplexity", dataset="text", reason="", best=(None, None), **axes):
    names = {
        "model": "m",
        "transform": "none",
        "mitigation": "rtn",
        "granularity": "group-32",
        "format": "int4",
        **axes,
    }
    numbers = {
        "value": value,
        "stderr": stderr,
        "count": 32,
        "difference": None,
        "difference_stderr": None,
        "best_difference": best[0],
        "best_difference_stderr": best[1],
        "unit": "",
    }
    place = {"metric": "" if reason else metric, "dataset": "" if reason else dataset}
    return {"cell": cell, **names, "status": "failed" if reason else "ok", "reason": reason, **place, **numbers}


def spec(rows=("transform",), columns=("mitigation",), metrics=("perplexity",), **table):
    return {
        "study": "a_study",
        "title": "A & B",
        "table": {"rows": list(rows), "columns": list(columns), "metrics": list(metrics), **table},
    }


def grid(model="m", prefix=""):
    """2 x 2 cells and their baseline: rotate + gptq is best, shift + gptq ties with it,
    shift + rtn failed."""
    return [
        record(f"{prefix}b", 8.0, 0.2, model=model, **BASELINE),
        record(f"{prefix}1", model=model, transform="shift", reason="no factor | in layer_3"),
        record(f"{prefix}2", 9.1, 0.1, model=model, transform="shift", mitigation="gptq", best=(0.1, 0.07)),
        record(f"{prefix}3", 12.0, 0.1, model=model, transform="rotate"),
        record(f"{prefix}4", 9.0, 0.1, model=model, transform="rotate", mitigation="gptq"),
    ]


def test_rows_columns_baseline_and_marks():
    table = study_tables.build(pd.DataFrame(grid()), spec())
    assert table.row_labels() == [["full precision"], ["shift"], ["rotate"]]
    assert table.column_labels() == ["RTN", "GPTQ"]
    assert table.groups() == [("perplexity, text ↓", 2)]
    assert table.baseline == [True, False, False]
    assert table.display.values.tolist() == [
        ["8.00 ± 0.20", "8.00 ± 0.20"],
        ["failed", "9.10 ± 0.10"],
        ["12.00 ± 0.10", "9.00 ± 0.10"],
    ]
    assert table.marks.values.tolist() == [["", ""], ["a", "tied"], ["", "best"]]
    assert table.footnotes == {"a": "no factor | in layer_3"}
    assert table.values.iloc[2, 1] == 9.0 and math.isnan(table.values.iloc[1, 0]) and table.stderrs.iloc[0, 0] == 0.2


def test_a_study_without_a_cell_is_an_error_with_its_name():
    with pytest.raises(ConfigError, match="a_study: table: no cell of this study has been measured"):
        study_tables.build(pd.DataFrame(grid()).iloc[:0], spec())


def test_order_is_that_of_first_appearance_even_if_the_baseline_comes_last():
    rows = [record("1", 1.0, transform="z"), record("2", 2.0, transform="a"), record("b", 0.5, **BASELINE)]
    table = study_tables.build(pd.DataFrame(rows), spec(columns=()))
    assert table.row_labels() == [["full precision"], ["z"], ["a"]]


def test_the_paired_difference_to_the_best_decides_and_not_the_errors_of_the_values():
    rows = [
        record("1", 9.0, 0.5, best=(0.0, 0.0), transform="rotate"),
        record("2", 9.1, 0.5, best=(0.1, 0.01), transform="shift"),
        record("3", 9.2, 0.5, best=(0.2, 0.11), transform="scale"),
        record("4", 9.2, 0.5, transform="other"),
    ]
    marks = study_tables.build(pd.DataFrame(rows), spec(columns=())).marks.iloc[:, 0].tolist()
    assert marks == ["best", "", "tied", ""]


def test_with_more_cells_more_are_needed_to_be_told_apart_from_the_best():
    """2.5 standard errors over 32 windows are p = 0.018: enough for one comparison, not for the
    least of ten (Holm)."""
    rows = [record("best", 9.0, 0.5, best=(0.0, 0.0), transform="best")]
    rows += [record(str(number), 9.25, 0.5, best=(0.25, 0.1), transform=f"t{number}") for number in range(10)]
    assert study_tables.build(pd.DataFrame(rows[:2]), spec(columns=())).marks.iloc[:, 0].tolist() == ["best", ""]
    assert study_tables.build(pd.DataFrame(rows), spec(columns=())).marks.iloc[:, 0].tolist() == [
        "best",
        *["tied"] * 10,
    ]


def test_an_unrounded_cell_does_not_compete():
    rows = [
        record("1", 8.0, 0.1, transform="rotate", mitigation="none", granularity="-", format="bf16"),
        record("2", 9.0, 0.1, transform="rotate"),
    ]
    marks = study_tables.build(pd.DataFrame([*rows, record("3", 9.5, 0.1)]), spec()).marks
    assert marks.values.tolist() == [["", "best"], ["missing", ""]]


def test_equal_best_values_are_all_bold_and_a_constant_column_has_no_best():
    values = [record("1", 4.0, transform="a"), record("2", 4.0, transform="b"), record("3", 5.0, transform="c")]
    bits = [
        record(cell, 4.25, metric="bits_per_weight", dataset="", transform=name)
        for cell, name in (("1", "a"), ("2", "b"), ("3", "c"))
    ]
    marks = study_tables.build(
        pd.DataFrame(values + bits), spec(columns=(), metrics=("perplexity", "bits_per_weight"))
    ).marks
    assert marks.iloc[:, 0].tolist() == ["best", "best", ""] and marks.iloc[:, 1].tolist() == ["", "", ""]


def test_higher_is_better_for_accuracy_and_sqnr():
    rows = [
        record(c, v, metric=n, dataset="", transform=c)
        for n in ("accuracy", "weight_sqnr_db")
        for c, v in (("a", 0.3), ("b", 0.6))
    ]
    marks = study_tables.build(pd.DataFrame(rows), spec(columns=(), metrics=("accuracy", "weight_sqnr_db"))).marks
    assert marks.values.tolist() == [["", ""], ["best", "best"]]


def test_each_model_has_its_own_baseline_and_best():
    table = study_tables.build(pd.DataFrame(grid("one", "x") + grid("two_", "y")), spec())
    assert table.rows == ["model", "transform"]
    assert [labels[0] for labels in table.row_labels()] == ["one"] * 3 + ["two_"] * 3
    assert table.baseline == [True, False, False, True, False, False]
    assert (table.marks.values == "best").sum() == 2


def test_models_as_rows_or_columns():
    frame = pd.DataFrame(
        [r for r in grid("one", "x") + grid("two", "y") if r["transform"] == "rotate" or r["format"] == "bf16"]
    )
    by_rows = study_tables.build(frame, spec(rows=("model",)))
    assert by_rows.row_labels() == [["one, full precision"], ["one"], ["two, full precision"], ["two"]]
    by_columns = study_tables.build(frame, spec(rows=("transform", "mitigation"), columns=("model",)))
    assert by_columns.column_labels() == ["one", "two"] and by_columns.row_labels()[0] == ["full precision", "–"]


def test_axes_that_vary_unnamed_become_rows():
    rows = [record("1", 1.0, format="int4"), record("2", 2.0, format="nvfp4"), record("b", 0.5, **BASELINE)]
    table = study_tables.build(pd.DataFrame(rows), spec())
    assert table.rows == ["transform", "format"]
    assert table.row_labels() == [
        ["full precision", "–"],
        ["no transform", "W4A4 INT4"],
        ["no transform", "W4A4 NVFP4"],
    ]


def test_two_cells_in_one_place_are_refused_by_name():
    with pytest.raises(ConfigError, match="a_study: table.*one place.*cell-1.*cell-2"):
        study_tables.build(pd.DataFrame([record("cell-1", 1.0), record("cell-2", 2.0)]), spec())
    with pytest.raises(ConfigError, match="two records of metric 'perplexity'"):
        study_tables.build(pd.DataFrame([record("1", 1.0), record("1", 2.0)]), spec())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (spec(rows=("transfrom",)), "did you mean 'transform'"),
        (spec(rows=("transform",), columns=("transform",)), "named twice"),
        (spec(metrics=()), "table.metrics is empty"),
        (spec(rows=(), columns=()), "table.rows is empty"),
        (spec(datasets=["other"]), "measured on none of other. Accepted: text"),
    ],
)
def test_a_wrong_spec_names_its_key(wrong, message):
    with pytest.raises(ConfigError, match=message):
        study_tables.build(pd.DataFrame([record("1", 1.0)]), wrong)


def test_missing_columns_are_named():
    with pytest.raises(ConfigError, match="no column stderr"):
        study_tables.build(pd.DataFrame([record("1", 1.0)]).drop(columns="stderr"), spec())


def test_datasets_open_columns_and_are_cut_to_the_spec():
    rows = [
        record("1", value, metric="accuracy", dataset=task)
        for task, value in (("arc", 0.5), ("copa", 0.6), ("siqa", 0.4))
    ]
    assert [
        text for text, _ in study_tables.build(pd.DataFrame(rows), spec(columns=(), metrics=("accuracy",))).groups()
    ][1] == "accuracy, copa ↑"
    cut = study_tables.build(pd.DataFrame(rows), spec(columns=(), metrics=("accuracy",), datasets=["siqa", "arc"]))
    assert cut.display.values.tolist() == [["0.4000", "0.5000"]]


def test_one_cell_all_failed_and_only_a_baseline():
    assert study_tables.build(pd.DataFrame([record("1", 1.0)]), spec()).marks.values.tolist() == [[""]]
    failed = study_tables.build(pd.DataFrame([record("1", reason="NaN")]), spec())
    assert failed.display.values.tolist() == [["failed"]]
    assert study_tables.build(pd.DataFrame([record("b", 8.0, **BASELINE)]), spec()).baseline == [True]


def test_missing_place_is_a_dash():
    rows = [record("1", 1.0, transform="a", mitigation="rtn"), record("2", 2.0, transform="b", mitigation="gptq")]
    assert study_tables.build(pd.DataFrame(rows), spec()).display.values.tolist() == [["1.000", "–"], ["–", "2.000"]]


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (16.4321, 0.3121, "16.43 ± 0.31"),
        (16.4321, 0.0996, "16.43 ± 0.10"),
        (1234.5, 56.7, "1234 ± 57"),
        (123456.0, 3456.0, "(1.235 ± 0.035)×10⁵"),
        (0.0000123, 0.0000004, "(1.230 ± 0.040)×10⁻⁵"),
        (4.125, math.nan, "4.125"),
        (0.0, 0.0, "0"),
        (-0.5, 0.25, "-0.50 ± 0.25"),
        (99999.9, math.nan, "1.000×10⁵"),
    ],
)
def test_significant_digits(value, stderr, text):
    assert style.with_error(value, stderr) == text


def test_files(tmp_path):
    frame = pd.DataFrame(grid() + [record("5", 1 / 3, 0.01, transform="<script>_x")])
    table = study_tables.build(frame, spec())
    writers.write(table, [tmp_path / f"t{suffix}" for suffix in (".csv", ".md", ".tex")])
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert float(rows[3]["perplexity | text | rtn"]) == 1 / 3 and rows[3]["perplexity | text | rtn | stderr"] == "0.01"
    assert rows[1]["perplexity | text | rtn"] == "" and "no factor" in rows[1]["failed"]
    markdown = (tmp_path / "t.md").read_text()
    assert (
        "&lt;script&gt;\\_x" in markdown
        and "**0.333 ± 0.010**" in markdown
        and "no factor \\| in layer\\_3" in markdown
    )
    body = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in body}) == 1
    latex = (tmp_path / "t.tex").read_text()
    assert (
        r"\toprule" in latex
        and r"A \& B" in latex
        and r"\textless{}script\textgreater{}\_x" in latex
        and r"layer\_3" in latex
    )
    assert latex.count("{") == latex.count("}")
    with pytest.raises(ConfigError, match=r"\.csv, \.md or \.tex"):
        writers.write(table, [tmp_path / "t.xls"])


def test_latex_of_powers():
    assert writers.escape_latex("(1.2 ± 0.1)×10⁻¹²") == r"(1.2 $\pm$ 0.1)$\times$10$^{-12}$"


def test_records_read_back_with_names_that_pandas_takes_for_nan(tmp_path):
    path = tmp_path / "s.csv"
    pd.DataFrame([record("1", 1.5, transform="None", mitigation="NA")]).to_csv(path, index=False)
    read = study_records.read_records(path)
    assert read.loc[0, ["transform", "mitigation", "value"]].tolist() == ["None", "NA", 1.5] and math.isnan(
        read.stderr[0]
    )


def test_footnote_letters():
    assert [study_tables.letter(number) for number in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]


@pytest.mark.parametrize("count", [2, 3, 16, 64])
def test_p_values_are_those_of_scipys_t_distribution_bit_for_bit(count):
    for ratio in (0.0, 1e-9, 0.3, 1.0, 2.5, 40.0, 1e9, math.inf):
        for sign in (1, -1):
            entry = study_tables.Entry("m", False, difference=sign * ratio, difference_stderr=1.0, count=count)
            assert study_tables.p_value(entry) == 2 * stats.t.sf(ratio, count - 1)


SEEDS = [
    record("b", 8.0, 0.2, **BASELINE),
    record("1", 9.0, 0.5, transform="turn-s1", best=(0.0, None)),
    record("2", 9.4, 0.5, transform="turn-s2", best=(0.4, 0.01)),
    record("3", 9.8, 0.5, transform="turn-s3", best=(0.8, 0.01)),
    record("4", 9.2, 0.5, transform="turn", best=(0.2, 0.01)),
    record("5", transform="turn-s4", reason="it broke"),
]


def test_seeds_of_an_entry_share_a_row_with_their_mean_and_standard_deviation():
    named = {**spec(columns=(), seeds="merged"), "transforms": ["turn"]}
    table = study_tables.build(pd.DataFrame(SEEDS), named)
    assert table.row_labels() == [["full precision"], ["turn, 3 seeds"], ["turn"], ["turn-s4"]]
    values, errors = table.values.iloc[:, 0].tolist(), table.stderrs.iloc[:, 0].tolist()
    assert values[1:3] == pytest.approx([9.4, 9.2]) and errors[1:3] == pytest.approx([0.4, 0.5])
    assert table.note.endswith("over the seeds, without a mark.") and table.display.iloc[3, 0] == "failed"
    assert table.marks.iloc[:, 0].tolist()[1:3] == ["", ""], "a mean over seeds is neither best nor tied"
    protocols = [{**row, "protocol": f'{{"window": {64 if row["cell"] == "2" else 128}}}'} for row in SEEDS]
    with pytest.raises(ConfigError, match="window"):
        study_tables.build(pd.DataFrame(protocols), named)
    apart = study_tables.build(pd.DataFrame(SEEDS), {**named, "table": {**named["table"], "seeds": "separate"}})
    assert len(apart.row_labels()) == 6 and apart.note == study_tables.NOTE


def test_a_name_that_ends_like_a_seed_is_an_entry_where_the_study_names_it():
    own = {**spec(columns=(), seeds="merged"), "transforms": ["none"], "also": [{"transforms": "turn-s1"}]}
    own["also"].append({"transforms": ["turn-s2", "turn-s3", "turn-s4", "turn"]})
    assert len(study_tables.build(pd.DataFrame(SEEDS), own).row_labels()) == 6
