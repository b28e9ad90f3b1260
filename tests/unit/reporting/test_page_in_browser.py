"""First screen and cells of the report in headless Chromium: lists and words filter, headers sort, CSV and
cards have the numbers, nothing is wider than a phone, and the console stays empty."""

from __future__ import annotations

import csv
import io
import urllib.parse

import pytest

from browser import CHROMIUM, driven
from overview_cases import results
from quantgrid.reporting.claims import headlines, reasons
from quantgrid.reporting.figures.pareto import points
from quantgrid.reporting.page import answer, report
from quantgrid.reporting.page.cell_cards import cell_lines, numbers

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
DRIVER = """<script>{
const seen = {}, all = (query) => Array.from(document.querySelectorAll(query));
const shown = (query) => all(query).filter((element) => !element.hidden);
const choose = (query, value) => { const list = document.querySelector(query); list.value = value; list.dispatchEvent(new Event("input")); };
const texts = (rows, column) => rows.map((row) => row.cells[column].textContent);
seen.first = shown("#answer tbody tr").map((row) => [row.dataset.model, row.cells[1].textContent, row.cells[2].textContent]);
seen.figures = shown("#answer figure").length; seen.reasons = shown("#answer li").length;
choose("#answer select[data-axis=model]", "one");
seen.chosen = [shown("#answer tbody tr").length, shown("#answer figure").length, shown("#answer li").length];
choose("#answer select[data-axis=budget]", "inf");
seen.unlimited = texts(shown("#answer tbody tr"), 2);
HTMLAnchorElement.prototype.click = function () { seen.file = [this.download, this.href]; };
document.querySelector("#answer button.csv").click(); seen.answer = seen.file;
choose("#cells select[data-axis=model]", "one"); choose("#cells select[data-axis=format]", "w4a16_g64");
seen.weights = texts(shown("#cells tbody tr"), 1); seen.counted = document.querySelector("#cells output").textContent;
all("#cells thead button")[4].click();
seen.sorted = texts(shown("#cells tbody tr"), 1);
document.querySelector("#cells button.csv").click();
choose("#cells select[data-axis=format]", ""); choose("#cells select[data-axis=transform]", "turn");
seen.turned = texts(shown("#cells tbody tr"), 1);
document.querySelector("#cells tbody tr:not([hidden]):not(.baseline) button.card").click();
const card = document.querySelector("#card");
seen.card = [card.open, card.querySelector("h2").textContent, card.querySelectorAll("tbody tr").length, card.querySelector("a").getAttribute("href")];
card.querySelector("button").click(); seen.closed = !card.open;
const images = all("#answer figure:not([hidden]) img");
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
seen.narrow = images.every((image) => image.getBoundingClientRect().right <= window.innerWidth);
seen.width = window.innerWidth;
const result = document.createElement("pre"); result.id = "seen"; result.textContent = JSON.stringify(seen); document.body.append(result);
}</script></body>"""  # noqa: E501


@pytest.fixture(scope="module")
def page() -> str:
    """The first screen of two models, without a plan behind it."""
    context = {"cells": [], "cards": {}, "recommended": [], "fronts": [], "reasons": []}
    for model in ("one", "two", "three"):
        records, items = results(model, model)
        lines = headlines.headlines(records, items, {})
        context["recommended"] += lines
        shown = [line for line in lines if line["budget"] == "5"]
        context["reasons"] += reasons.reasons(shown, records, items, {})
        context["fronts"] += answer.fronts(points(records, {}))
        context["cells"] += cell_lines(records, {})
        for cell, part in records.groupby("cell"):
            lines = [numbers(row) for row in part.itertuples()]
            card = {"title": f"card of {cell} </script>", "axes": {"model": model}, "reason": "", "numbers": lines}
            context["cards"][cell] = {
                **card,
                "entries": {"format": {"preset": "int4"}},
                "links": {"log": "logs/a b.log"},
            }
    return report.build([], {**context, "budget": "5"})


def download(file: list[str]) -> tuple[str, list[list[str]]]:
    """Name and lines of a CSV file that the page offered."""
    name, address = file
    return name, list(csv.reader(io.StringIO(urllib.parse.unquote(address.partition(",")[2]))))


@pytest.mark.parametrize("width", [400, 1400])
def test_the_first_screen_and_the_cells(page, tmp_path, width):
    seen = driven(tmp_path / "r.html", page, DRIVER, width)
    assert [line[0] for line in seen["first"]] == ["one"] * 4 + ["two"] * 4 + ["three"] * 4
    assert seen["figures"] == seen["reasons"] == 6 and seen["chosen"] == [4, 2, 2]
    assert seen["first"][0][1:] == ["weights only, no online operations", "W4A16 g64 GPTQ"]
    assert seen["unlimited"] == ["W4A16 g64 GPTQ", "W4A16 g64 turn + GPTQ", "W8A8 INT8 group-16 GPTQ"]
    name, (heads, *lines) = download(seen["answer"])
    assert name == "recommended-recipes-no-limit.csv" and len(lines) == 3
    assert heads[:3] == ["model", "deployment", "recipe"]
    at = heads.index("divergence, nats/token")
    assert heads[at + 1] == "divergence, nats/token, as shown" and float(lines[0][at]) == pytest.approx(0.03)
    assert lines[0][at + 1].startswith("0.0300 (0.0")
    weights = ["full precision", "W4A16 g64 turn + GPTQ", "W4A16 g64 GPTQ", "W4A16 g64 RTN"]
    assert sorted(seen["weights"]) == sorted(weights) and seen["counted"] == "3 of 27 rows"
    assert seen["sorted"] == weights
    name, lines = download(seen["file"])
    assert name == "cells.csv" and len(lines) == 5 and lines[0][:2] == ["model", "recipe"]
    assert lines[2][1] == weights[1] and float(lines[2][4]) == pytest.approx(0.02)
    assert len(seen["turned"]) == 4 and all("turn" in recipe for recipe in seen["turned"][1:])
    opened, title, rows, link = seen["card"]
    assert opened and title.endswith("</script>") and rows == 5 and link == "logs/a%20b.log" and seen["closed"]
    assert seen["width"] == width and not seen["wide"] and seen["narrow"]
