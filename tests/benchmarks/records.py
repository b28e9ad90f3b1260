"""Records of benchmark ratios: ``benchmarks.csv`` and ``benchmarks.md`` of a results folder, one
row per case and reference.

A ratio is the case relative to its reference, of medians, both taken in turns in one run; ``goal``
is the highest ratio that reaches it. ``rate`` is what the milliseconds come to where that says more
(tokens/s, s/layer).
"""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

from quantgrid.ground.storage import write_text

FIELDS = (
    "benchmark",
    "case",
    "device",
    "threads",
    "milliseconds",
    "rate",
    "reference",
    "reference_milliseconds",
    "reference_rate",
    "ratio",
    "goal",
    "reached",
    "peak_mb",
    "reference_peak_mb",
    "repeats",
    "commit",
)


def row(
    benchmark: str, case: str, threads: int, reference: str, ratio: float, goal: float | None, **measured: object
) -> dict[str, object]:
    """One row of the table, measured on the CPU; ``measured`` are further fields of it, a field
    that is left out stays empty."""
    reached = "" if goal is None else "yes" if ratio <= goal else "no"
    return {
        **dict.fromkeys(FIELDS, ""),
        "benchmark": benchmark,
        "case": case,
        "device": "cpu",
        "threads": threads,
        "reference": reference,
        "ratio": f"{ratio:.3g}",
        "goal": "" if goal is None else f"{goal:.3g}",
        "reached": reached,
        **measured,
    }


def timed_row(
    benchmark: str,
    case: str,
    threads: int,
    reference: str,
    milliseconds: dict[str, float],
    goal: float | None,
    **measured: object,
) -> dict[str, object]:
    """The row of two medians in ``milliseconds``, by the names of case and reference."""
    own, other = milliseconds[case], milliseconds[reference]
    return row(
        benchmark,
        case,
        threads,
        reference,
        own / other,
        goal,
        milliseconds=f"{own:.4g}",
        reference_milliseconds=f"{other:.4g}",
        **measured,
    )


def unmeasured(benchmark: str, case: str, reason: str, **measured: object) -> dict[str, object]:
    """The row of what was not measured, or not against its reference, for ``reason``."""
    return {
        **dict.fromkeys(FIELDS, ""),
        "benchmark": benchmark,
        "case": case,
        "reached": f"not measured: {reason}",
        **measured,
    }


def show(row: dict[str, object]) -> None:
    """Print what a row says, in one line."""
    own, other = (
        (row[name] and f"{row[name]} ms", row[rate], row[peak] and f"{row[peak]} MB")
        for name, rate, peak in (
            ("milliseconds", "rate", "peak_mb"),
            ("reference_milliseconds", "reference_rate", "reference_peak_mb"),
        )
    )
    if not row["ratio"]:
        print(": ".join(filter(None, (row["case"], ", ".join(filter(None, own)), row["reached"]))))
        return
    goal = f", goal {row['goal']}: {row['reached']}" if row["goal"] else ""
    print(
        f"{row['threads']} threads  {row['case']} ({', '.join(filter(None, own))}) = {row['ratio']} x "
        f"{row['reference']} "
        f"({', '.join(filter(None, other))}){goal}"
    )


def record(benchmark: str, rows: list[dict[str, object]], folder: Path) -> None:
    """Put ``rows``, with the commit that is checked out, in the place of this benchmark's earlier
    ones in benchmarks.csv, and the whole table in benchmarks.md."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "benchmarks.csv"
    kept: list[dict[str, object]] = []
    if table.exists():
        with table.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["benchmark"] != benchmark]
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    # nothing outside a repository
    commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    rows = kept + [{**row, "commit": commit} for row in rows]
    lines = [",".join(FIELDS), *(",".join(_quoted(row.get(field) or "") for field in FIELDS) for row in rows)]
    write_text(table, "\n".join(lines) + "\n")
    lines = ["| " + " | ".join(FIELDS) + " |", "|" + " --- |" * len(FIELDS)]
    lines += ["| " + " | ".join(str(row.get(field) or "") for field in FIELDS) + " |" for row in rows]
    write_text(folder / "benchmarks.md", "\n".join(lines) + "\n")


def write_table(rows: list[dict[str, object]], path: Path) -> None:
    """Rows of one form as CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _quoted(value: object) -> str:
    return f'"{value}"' if "," in str(value) else str(value)
