"""Writers of a :class:`Table`: CSV (full precision, with standard errors), Markdown (GitHub) and
LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ...ground.errors import ConfigError
from ...ground.storage import replacing, write_text
from ..style import superscript
from .parts import parts
from .study_tables import Table, as_tuple


def numbers(table: Table) -> pd.DataFrame:
    """Build one row per table row: axis values, then value and stderr of every column in full
    precision, then the failures, and the columns of cells of which a training kept its start."""
    result = pd.DataFrame([as_tuple(key) for key in table.display.index], columns=table.rows)
    notes, kept = ([[] for _ in table.baseline] for _ in range(2))
    for position, key in enumerate(table.display.columns):
        name = " | ".join(part for part in key if part)
        result[name] = table.values.iloc[:, position].to_numpy()
        result[f"{name} | stderr"] = table.stderrs.iloc[:, position].to_numpy()
        for row, mark in enumerate(table.marks.iloc[:, position]):
            if mark in table.footnotes:
                notes[row].append(f"{name}: {table.footnotes[mark]}")
            if table.start_kept.iloc[row, position]:
                kept[row].append(name)
    result["failed"], result["start_kept"] = ["; ".join(note) for note in notes], ["; ".join(names) for names in kept]
    return result


def write_csv(table: Table, path: str | Path) -> None:
    """Write :func:`numbers`; a float is written as the shortest text that reads back exactly."""
    with replacing(path) as temporary:
        numbers(table).to_csv(temporary, index=False, lineterminator="\n")


def markdown(table: Table) -> str:
    """Format the table as GitHub Markdown, its parts below each other, with its notes."""
    notes = [
        table.note,
        *(f"<sup>{name}</sup> failed: {escape_markdown(reason)}" for name, reason in table.footnotes.items()),
    ]
    body = "\n\n".join(map(markdown_part, parts(table)))
    return f"**{escape_markdown(table.title)}**\n\n{body}\n\n" + "<br>\n".join(notes) + "\n"


def markdown_part(table: Table) -> str:
    """Format the columns of one part; the metric stands above them if an axis is in the columns."""
    upper = [escape_markdown(text) for text, width in table.groups() for _ in range(width)]
    labels = list(map(escape_markdown, table.column_labels()))
    above = [f"{upper[0]}:", ""] if table.columns else []
    heads = labels if table.columns else upper
    lines = [[*map(escape_markdown, table.rows), *heads], [":--"] * len(table.rows) + ["--:"] * len(heads)]
    styles = {"best": "**{}**", "tied": "{} †", "missing": "{}", "": "{}"}
    for names, texts, marks in zip(table.row_labels(), table.display.values, table.marks.values):
        cells = (styles.get(mark, f"{{}} <sup>{mark}</sup>").format(text) for text, mark in zip(texts, marks))
        lines.append([*map(escape_markdown, names), *cells])
    return "\n".join([*above, *(f"| {' | '.join(line)} |" for line in lines)])


def escape_markdown(text: str) -> str:
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)


def latex(table: Table) -> str:
    """Format the table as a ``table`` environment for the booktabs package, its parts below each
    other."""
    notes = [
        escape_latex(table.note),
        *(rf"\textsuperscript{{{name}}} failed: {escape_latex(reason)}" for name, reason in table.footnotes.items()),
    ]
    label = re.sub("[^A-Za-z0-9:-]", "-", table.study)
    head = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\label{{tab:{label}}}",
    ]
    body = [line for piece in parts(table) for line in latex_part(piece)]
    end = [r"\par\smallskip\footnotesize " + r" \\ ".join(notes), r"\end{table}"]
    return "\n".join([*head, *body, *end]) + "\n"


def latex_part(table: Table) -> list[str]:
    """Format the columns of one part as a ``tabular`` environment."""
    groups, labels = table.groups(), table.column_labels()
    upper = [""] * len(table.rows) + [
        rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(text)}}}" for text, width in groups
    ]
    lines = [
        join_latex(upper),
        rules(len(table.rows), groups),
        join_latex(map(escape_latex, [*table.rows, *labels])),
        r"\midrule",
    ]
    styles = {"best": ("\\textbf{", "}"), "tied": ("", r"$^\dagger$"), "missing": ("", ""), "": ("", "")}
    for row, (names, texts, marks) in enumerate(zip(table.row_labels(), table.display.values, table.marks.values)):
        if row and table.baseline[row] != table.baseline[row - 1]:
            lines.append(r"\midrule")
        styled = zip(
            map(escape_latex, texts), (styles.get(mark, ("", rf"\textsuperscript{{{mark}}}")) for mark in marks)
        )
        cells = [before + text + after for text, (before, after) in styled]
        lines.append(join_latex([*map(escape_latex, names), *cells]))
    tabular = rf"\begin{{tabular}}{{{'l' * len(table.rows)}{'r' * len(labels)}}}"
    return [tabular, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}", r"\par\medskip"]


def join_latex(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def rules(first: int, groups: list[tuple[str, int]]) -> str:
    """Build the rules under the upper header, one per group of columns."""
    ends = [first + sum(width for _, width in groups[: position + 1]) for position in range(len(groups))]
    return " ".join(rf"\cmidrule(lr){{{end - width + 1}-{end}}}" for end, (_, width) in zip(ends, groups))


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
LATEX |= {character: "\\" + character for character in "{}$&#%_"}
LATEX |= {
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "α": r"$\alpha$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "\n": " ",
}
SUPERSCRIPTS = {superscript(digit): str(digit) for digit in range(10)} | {"⁻": "-"}


def escape_latex(text: str) -> str:
    """Escape ``text`` for pdfLaTeX: its special characters, and the symbols used in tables."""
    plain = "".join(LATEX.get(character, character) for character in str(text))
    exponents = f"[{''.join(SUPERSCRIPTS)}]+"
    return re.sub(exponents, lambda found: f"$^{{{''.join(map(SUPERSCRIPTS.get, found[0]))}}}$", plain)


def write(table: Table, paths: list[str | Path]) -> None:
    """Write the table to each path, in the format of its suffix (.csv, .md, .tex)."""
    for path in map(Path, paths):
        if path.suffix == ".csv":
            write_csv(table, path)
        elif path.suffix in (".md", ".tex"):
            write_text(path, markdown(table) if path.suffix == ".md" else latex(table))
        else:
            raise ConfigError(f"{path}: a table is written as .csv, .md or .tex")
