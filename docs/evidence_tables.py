"""Tables of docs/evidence.md: verdicts of a kept run on the findings of the paper, judged again from its
records and the loss and divergence of every window, because a run made in parts has no report of all parts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from run_costs import of_rules
from run_files import ITEMS

from quantgrid.reporting.claims import contrasts, findings, verdicts
from quantgrid.reporting.claims.contrasts import DIVERGENCE, LOSS
from quantgrid.reporting.data.collection import merge, read, write
from quantgrid.reporting.style import significant

WANTED = 0.05  # share of a divergence that the main studies should decide


def judged(folder: Path, about: dict[str, Any]) -> pd.DataFrame:
    """Judge the claims of config/claims.yaml on the kept studies (:func:`run_files.kept`): the rows of
    :func:`verdicts.evaluate`."""
    records = merge([read(folder / "studies" / f"{study}.csv") for study in about["studies"]])
    items = pd.read_parquet(folder / ITEMS).astype({"value": "float64"})
    return verdicts.evaluate(contrasts.read(), contrasts.margins(), records, items, about["named"])


def tables(folder: Path, about: dict[str, Any]) -> dict[str, str]:
    """Make all tables, by their mark in docs/evidence.md."""
    rows = judged(folder, about)
    made = {"counted": counted, "findings": claims, "power": power, "undecided": undecided}
    return {name: table(rows) for name, table in made.items()} | {"parts": parts(folder, about)}


def parts(folder: Path, about: dict[str, Any]) -> str:
    """Tabulate the studies with their models, cells and commits; add the processor hours of all jobs."""
    lines = ["| study | models | quantized cells | commit |", "| :-- | :-- | --: | :-- |"]
    for study in about["studies"]:
        found = read(folder / "studies" / f"{study}.csv")
        cells = found[found.mitigation != "none"].cell.nunique()
        lines.append(f"| {study} | {', '.join(found.model.unique())} | {cells} | {about['commits'][study]} |")
    jobs = of_rules(folder)
    hours = jobs.cpu_seconds.sum() / 3600
    missing = f" Not computed yet: {', '.join(about['missing'])}." if about["missing"] else ""
    return "\n".join([*lines, "", f"{len(jobs)} jobs, {hours:.1f} hours of one processor in all.{missing}"])


def listed(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """List the claims that have a comparison, with their verdicts by model (:func:`findings.judged`)."""
    with tempfile.TemporaryDirectory() as scratch:
        write(rows, Path(scratch) / "claims.csv")
        return findings.judged(findings.read(Path(scratch) / "claims.csv"))


def claims(rows: pd.DataFrame) -> str:
    """The findings with their verdicts, a column for each model: how many comparisons hold, and
    what speaks least for it."""
    found = listed(rows)
    models = findings.models(found)
    lines = [f"| finding | in the paper | {' | '.join(models)} |", f"| {' | '.join([':--'] * (2 + len(models)))} |"]
    for claim in found:
        lines.append(
            f"| {claim['statement']} | {claim['paper']} | "
            f"{' | '.join(verdict(claim['verdicts'].get(model)) for model in models)} |"
        )
    note = (
        "Below a verdict: how many comparisons hold, and the change of perplexity or divergence in the one that speaks "
        "least for the claim, with its 95 % interval. Paired by window, adjusted by Holm over all comparisons of a "
        "model and metric."
    )
    total = ", ".join(f"{name} {count}" for name, count in findings.counts(found).items())
    return "\n".join([f"Verdicts over all models: {total}.", "", *lines, "", note])


def verdict(given: dict[str, Any] | None) -> str:
    """A verdict with its counts and its weakest comparison, as a cell of a table."""
    if given is None:
        return "–"
    if given["weakest"] is None:
        return str(given["verdict"])
    against = f" against {given['against']}" if given["against"] else ""
    starts = f", {given['start_kept']} with a start kept" if given["start_kept"] else ""
    held = f"{given['counts']['holds']} of {given['tested']} hold{against}{starts}"
    return f"**{given['sign']} {given['verdict']}**<br>{held}<br>{given['weakest']['shown']}"


def counted(rows: pd.DataFrame) -> str:
    """Count the claims of each verdict, by model and metric."""
    found = listed(rows)
    names = [name for name in findings.VERDICTS if name in findings.counts(found)]
    lines = [f"| model | metric | {' | '.join(names)} |", f"| :-- | :-- | {' | '.join(['--:'] * len(names))} |"]
    for model in findings.models(found):
        for metric, own in (("perplexity", False), ("divergence", True)):
            part = [
                {**claim, "verdicts": {model: claim["verdicts"][model]}}
                for claim in found
                if model in claim["verdicts"] and claim["statement"].endswith("(by divergence)") == own
            ]
            counts = findings.counts(part)
            lines.append(f"| {model} | {metric} | {' | '.join(str(counts.get(name, 0)) for name in names)} |")
    return "\n".join([*lines, ""])


def power(rows: pd.DataFrame) -> str:
    """Tabulate the differences that the comparisons of each model decide with a power of 80 %: of perplexity in
    percent, of divergence in percent of the mean of the two cells; adjusted for all comparisons, and of one alone."""
    margins = contrasts.margins()
    tested = rows[(rows.detectable > 0) & (rows.threshold == 0) & rows.metric.isin(margins)]
    unit = pd.Series(1.0, tested.index).where(tested.metric == LOSS, margins[DIVERGENCE] / tested.margin.astype(float))
    adjusted, alone = tested.detectable * unit, (tested.high - tested.low) * verdicts.detectable_widths(1) * unit
    names = ["perplexity", "divergence", "lowest, highest tenth", f"at most {WANTED:.0%}", "divergence, one alone"]
    lines = [f"| model | comparisons | {' | '.join(names)} |", f"| :-- | {' | '.join(['--:'] * (1 + len(names)))} |"]
    for model, own in adjusted.groupby(tested.model, sort=False):
        loss, divergence = (own[tested.metric[own.index] == metric] for metric in (LOSS, DIVERGENCE))
        low, high = divergence.quantile([0.1, 0.9])
        cells = [percent(loss.median()), percent(divergence.median()), f"{percent(low)}, {percent(high)}"]
        cells += [f"{(divergence <= WANTED).mean():.0%} of them", percent(alone[divergence.index].median())]
        lines.append(f"| {model} | {len(divergence)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def percent(share: float) -> str:
    return f"{significant(100 * share, 2)} %"


def undecided(rows: pd.DataFrame) -> str:
    """The undecided claims: in the comparison that speaks least for each, the effect with its interval and
    the difference from the threshold that it decides with a power of 80 %."""
    lines = ["| finding | model | effect | decides | reason |", "| :-- | :-- | :-- | --: | :-- |"]
    for claim in listed(rows):
        for model, given in claim["verdicts"].items():
            if given["verdict"] == "undecided":
                weakest = given["weakest"]
                cells = (claim["statement"], model, weakest["shown"], weakest["detectable"], weakest["reason"] or "–")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
