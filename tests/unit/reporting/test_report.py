"""The report: everything escaped, no network, costs from benchmark files, and a table that sorts
and filters in a browser."""

from html.parser import HTMLParser

import pandas as pd
import pytest

from browser import CHROMIUM, driven
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.claims import findings
from quantgrid.reporting.claims.verdicts import COLUMNS as CLAIM_COLUMNS
from quantgrid.reporting.data import costs
from quantgrid.reporting.page import report

EVIL = "<script>alert('x')</script>_&\"name"
BASELINE = {"transform": "none", "mitigation": "none", "granularity": "-", "format": "bf16"}
VOID = {"meta", "input", "img", "br", "link", "hr"}


def record(cell, value=None, reason="", **axes):
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
        "stderr": 0.1,
        "count": 32,
        "difference": None,
        "difference_stderr": None,
        "best_difference": None,
        "best_difference_stderr": None,
        "unit": "",
    }
    place = {"metric": "" if reason else "perplexity", "dataset": "" if reason else "text"}
    return {"cell": cell, **names, "status": "failed" if reason else "ok", "reason": reason, **place, **numbers}


def section(name="study_one", rows=None, **extra):
    table = {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]}
    figure = {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "perplexity"}
    return report.StudySection(
        {"study": name, "title": f"Title of {name}", "table": table, "figure": figure},
        pd.DataFrame(rows or cells()),
        **extra,
    )


def cells():
    rows = [record("b", 8.0, **BASELINE), record("f", reason=f"no factor {EVIL}", transform="shift")]
    values = {"rotate": 9.0, "scale": 100.0, EVIL: 20.0, "affine": 8.5}
    return rows + [record(str(number), value, transform=name) for number, (name, value) in enumerate(values.items())]


class Page(HTMLParser):
    """Collects tags and addresses, and whether every element is closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids, self.wrong = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_everything_from_data_is_escaped_and_nothing_is_fetched(tmp_path):
    figure = tmp_path / "f.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    context = {key: [{"name": EVIL, "provenance": EVIL}] for key in ("models", "corpora")}
    context |= {key: {EVIL: EVIL} for key in ("versions", "hashes", "protocol", "config")} | {
        "title": EVIL,
        "description": EVIL,
    }
    context |= {
        "benchmarks": [{"rule": EVIL, "name": EVIL, "seconds": 1.0, "max_rss_mb": 2.0, "cpu_seconds": 1.0}],
        "missing": [{"cell": EVIL}],
    }
    context["distributions"] = [
        {"model": EVIL, "name": EVIL, "caption": EVIL, "path": str(figure), "links": {EVIL: "studies/a b.csv"}}
    ]
    links = {EVIL: "studies/a b.csv", "bad": "javascript:alert(1)"}
    page = Page(report.build([section(figure=figure, links=links), section(EVIL)], context))
    assert page.tags.count("script") == 2 and not page.wrong and not page.open
    known = ("#", "data:image/svg+xml;base64,", "data:text/csv;base64,", "studies/a%20b.csv", "javascript%3A")
    assert all(address.startswith(known) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)


def test_content_of_the_page(tmp_path):
    figure = tmp_path / "f.png"
    figure.write_bytes(b"png")
    job = {"rule": "quantize_model", "seconds": 3600.0, "max_rss_mb": 812.4, "cpu_seconds": 90.0}
    benchmarks = [{**job, "name": f"m/{number}"} for number in range(2)]
    context = {
        "title": "A run",
        "models": [{"layers": 30, "name": "smol", "provenance": "rounded before us"}],
        "benchmarks": benchmarks,
    }
    text = report.build([section(figure=figure)], {**context, "config": {"seed": 7}, "versions": {"python": "3.11"}})
    wanted = (
        "data:image/png;base64,cG5n",
        "rounded before us",
        "2 h 00 min",
        "812",
        "&#34;seed&#34;: 7",
        "Content-Security-Policy",
        "@media print",
    )
    for expected in wanted:
        assert expected in text, expected
    assert text.index(">name<") < text.index(">provenance<") < text.index(">layers<")
    assert text == report.build(
        [section(figure=figure)], {**context, "config": {"seed": 7}, "versions": {"python": "3.11"}}
    )


@pytest.mark.parametrize(("fewest", "said"), [(0.0, 1), (0.02, 0)])
def test_an_expert_that_saw_no_token_is_noted(fewest, said):
    row = {**record("0", fewest, transform="rotate"), "metric": "expert_tokens_smallest", "dataset": ""}
    text = report.build([section(rows=[*cells(), row])], {})
    assert text.count("At least one expert of m saw no calibration token") == said


def test_no_studies_and_an_unknown_key():
    assert "0 studies" in report.build([], {})
    with pytest.raises(ConfigError, match="unknown modles. Accepted: .*models"):
        report.build([], {"modles": []})


def test_a_study_that_cannot_be_shown_says_so_and_the_others_stand(tmp_path):
    broken = section("broken", rows=[record("1", 1.0), record("2", 2.0)])
    text = report.build([broken, section("whole"), section("pictureless", figure=tmp_path / "absent.svg")], {})
    assert (
        "fall into one place" in text and "full precision" in text and "absent.svg: the report shows existing" in text
    )


def test_failed_and_missing_cells_are_listed_once_with_their_studies():
    frame = pd.DataFrame([*cells(), {**record("n", 1.0, transform="other"), "metric": "kl_divergence"}])
    studies = [report.StudySection({**section(name).spec}, frame) for name in ("one", "two")]
    lines = report.problems(studies, [{"cell": "gone", "model": "m"}])
    assert [(line["state"], line["cell"], line["studies"]) for line in lines] == [
        ("failed", "f", ["one", "two"]),
        ("missing", "n", ["one", "two"]),
        ("missing", "gone", []),
    ]
    assert lines[1]["reason"] == "no perplexity" and report.counts(studies) == {"studies": 2, "cells": 7, "failed": 1}


def test_costs_are_read_from_benchmark_files(tmp_path):
    header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    for place, line in (
        ("quantize_model/m/rotate/abc.tsv", "2.5\t0:00:02\t812.5\t1\t1\t1\t0\t0\t99\t2.4\n"),
        ("quantize_model/m/none/def.tsv", "1.5\t0:00:01\t-\t1\t1\t1\t0\t0\t99\tNA\n"),
        ("fetch_model/m.tsv", "9\t0:00:09\t100\t1\t1\t1\t0\t0\t99\t3\n11\t0:00:11\t140\t1\t1\t1\t0\t0\t99\t5\n"),
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + line)
    (tmp_path / "compare_study").mkdir()
    (tmp_path / "compare_study" / "failed.tsv").touch()  # by Snakemake, of a job that failed
    records = costs.read(tmp_path)
    assert [(entry["rule"], entry["name"], entry["seconds"]) for entry in records] == [
        ("fetch_model", "m", 10.0),
        ("quantize_model", "m/none/def", 1.5),
        ("quantize_model", "m/rotate/abc", 2.5),
    ]
    rules = costs.summary(records)
    assert [(rule["rule"], rule["jobs"], rule["seconds"], rule["seconds_max"]) for rule in rules] == [
        ("fetch_model", 1, 10.0, 10.0),
        ("quantize_model", 2, 4.0, 2.5),
    ]
    assert rules[0]["max_rss_mb"] == 140.0 and rules[1]["max_rss_mb"] == 812.5
    (tmp_path / "fetch_model" / "x.tsv").write_text("nothing\n1\n")
    with pytest.raises(ConfigError, match="x.tsv: not a benchmark file"):
        costs.read(tmp_path)
    assert costs.summary([]) == [] and costs.read(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.3, "12 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (float("nan"), "–")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


DRIVER = """<script>
const table = document.querySelector("table.study"), rows = () => Array.from(table.tBodies[0].rows);
const names = () => rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const button = table.querySelectorAll("thead button")[1], seen = {start: names()};
for (const step of ["up", "down", "back"]) { button.click(); seen[step] = names(); }
table.querySelectorAll("thead button")[0].click(); seen.names = names();
const input = document.querySelector(".filtered input");
input.value = "RoT"; input.dispatchEvent(new Event("input")); seen.filtered = names(); seen.counted = document.querySelector("output").textContent;
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
const result = document.createElement("pre"); result.id = "seen"; result.textContent = JSON.stringify(seen); document.body.append(result);
</script></body>"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_sort_and_filter_in_a_browser(tmp_path):
    rows = [row if row["transform"] != EVIL else {**row, "transform": "learned"} for row in cells()]
    seen = driven(tmp_path / "r.html", report.build([section(rows=rows)], {}), DRIVER)
    top = ["full precision"]
    assert seen["start"] == seen["back"] == [*top, "shift", "rotate", "scale", "learned", "affine"]
    assert seen["up"] == [*top, "affine", "rotate", "learned", "scale", "shift"]
    assert seen["down"] == [*top, "scale", "learned", "rotate", "affine", "shift"]
    assert seen["names"] == [*top, "affine", "learned", "rotate", "scale", "shift"]
    assert seen["filtered"] == [*top, "rotate"] and seen["counted"] == "1 of 5 rows"
    assert not seen["wide"]


FINDINGS_DRIVER = """<script>
const table = document.querySelector("table.matrix"), rows = () => Array.from(table.tBodies[0].rows);
const names = () => rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const seen = {start: names()}; table.querySelectorAll("thead button")[2].click(); seen.sorted = names();
const input = document.querySelector("#findings input");
input.value = "does not hold"; input.dispatchEvent(new Event("input")); seen.filtered = names();
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
const result = document.createElement("pre"); result.id = "seen"; result.textContent = JSON.stringify(seen); document.body.append(result);
</script></body>"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_findings_sort_by_verdict_and_filter_by_its_words(tmp_path):
    names = {"one": "undecided", "two": "holds", "three": "does not hold", "four": "holds"}
    effect = {
        "effect": -0.1,
        "low": -0.2,
        "high": -0.05,
        "threshold": 0,
        "side": "below",
        "margin": 0.02,
        "detectable": 0.1,
        "p": 0.01,
        "p_adjusted": 0.02,
    }
    comparison = {"comparison": "a: + b; − c", "dataset": "docs", "count": 32, "cells": "k1 k2", **effect}
    claims = [
        {
            "claim": name,
            "statement": f"{name} is so",
            "model": "m",
            "verdict": verdict,
            "outcome": verdict,
            **comparison,
        }
        for name, verdict in names.items()
    ]
    pd.DataFrame(claims, columns=list(CLAIM_COLUMNS)).to_csv(tmp_path / "claims.csv", index=False)
    seen = driven(
        tmp_path / "r.html", report.build([], {"claims": findings.read(tmp_path / "claims.csv")}), FINDINGS_DRIVER
    )
    assert (
        seen["start"] == [f"{name} is so" for name in names]
        and seen["filtered"] == ["three is so"]
        and not seen["wide"]
    )
    # equal verdicts keep their order
    assert seen["sorted"][seen["sorted"].index("two is so") + 1] == "four is so"
