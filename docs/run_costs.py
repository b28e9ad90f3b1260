"""Costs of a run and spread of its seeds as Markdown: tables of the documents that ``update.py``
writes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from run_files import JOBS, NUMBERS

from quantgrid.reporting.data.costs import summary

SEED = r"-s\d+$"  # end of a name with several seeds


def several(found: pd.DataFrame) -> list[str]:
    """The model as a column to tell rows apart by, where there is more than one."""
    return ["model"] if found["model"].nunique() > 1 else []


def markdown(title: str, names: list[str], numbers: list[str], rows: list[list[str]]) -> str:
    """A table below a headline, ``names`` to the left and ``numbers`` to the right."""
    head = [
        f"## {title}",
        f"| {' | '.join([*names, *numbers])} |",
        f"| {' | '.join([':--'] * len(names) + ['--:'] * len(numbers))} |",
    ]
    return "\n".join([*head, *(f"| {' | '.join(map(str, row))} |" for row in rows), "", ""])


def of_rules(run: Path, *rules: str) -> pd.DataFrame:
    """Costs of the jobs of these rules; ``run`` is the folder of its kept records."""
    found = pd.read_csv(run / JOBS, keep_default_na=False, na_values={name: [""] for name in NUMBERS})
    return found[found.rule.isin(rules)] if rules else found


def costs(run: Path) -> str:
    """Seconds and memory per rule, as the jobs recorded them; processor time does
    not grow with other work on the machine."""
    found = summary(of_rules(run).to_dict("records"))
    rows = [
        [
            row["rule"],
            row["jobs"],
            *(f"{row[name]:.0f}" for name in ("seconds", "cpu_seconds", "seconds_max", "max_rss_mb")),
        ]
        for row in found
    ]
    processors = sum(row["cpu_seconds"] for row in found) / 60
    numbers = ["jobs", "seconds, all", "processor seconds, all", "seconds, longest", "peak RSS, MB"]
    return (
        markdown("Costs", ["rule"], numbers, rows).rstrip("\n")
        + f"\n\nAll jobs together: {processors:.0f} minutes of one processor.\n"
    )


def fits(run: Path) -> str:
    """Wall time of fitting each transform and the size of its parameters; of several seeds the
    mean. Nothing where all took less than a second."""
    found = of_rules(run, "fit_transform")
    if found.empty or found.seconds.max() < 1:
        return ""
    found[["model", "transform", "fitted to", "key"]] = found.name.str.split("/", expand=True)
    found["transform"] = found["transform"].str.replace(SEED, "", regex=True)
    names = [*several(found), "transform", "fitted to"]
    grouped = found.groupby(names).agg(
        jobs=("seconds", "size"),
        seconds=("seconds", "mean"),
        peak=("max_rss_mb", "max"),
        megabytes=("megabytes", "mean"),
    )
    rows = [
        [*key, f"{row.jobs:.0f}", f"{row.seconds:.3g}", f"{row.peak:.0f}", f"{row.megabytes:.3g}"]
        for key, row in grouped.iterrows()
    ]
    return markdown("Fitting the transforms", names, ["seeds", "seconds, mean", "peak RSS, MB", "file, MB"], rows)


def solves(run: Path) -> str:
    """Wall time and memory of quantizing a whole model by each mitigation, over transforms and
    formats, import and checkpoint included."""
    found = of_rules(run, "quantize_model", "train_mitigation")
    if found.empty:
        return ""
    found[["model", "transform", "mitigation", "granularity", "format", "key"]] = found.name.str.split("/", expand=True)
    names = [*several(found), "mitigation"]
    grouped = (
        found[found.mitigation != "none"]
        .groupby(names)
        .agg(
            jobs=("seconds", "size"),
            mean=("seconds", "mean"),
            low=("seconds", "min"),
            high=("seconds", "max"),
            peak=("max_rss_mb", "max"),
        )
    )
    order = [*names[:-1], "mean"]
    rows = [
        [
            *(key if isinstance(key, tuple) else (key,)),
            f"{row.jobs:.0f}",
            f"{row['mean']:.0f}",
            f"{row.low:.0f} to {row.high:.0f}",
            f"{row.peak:.0f}",
        ]
        for key, row in grouped.sort_values(order).iterrows()
    ]
    return markdown("Quantizing the model", names, ["jobs", "seconds, mean", "range", "peak RSS, MB"], rows)


def spread(run: Path) -> str:
    """Perplexity and KL divergence of names with several seeds: mean, standard deviation over
    seeds, range; nothing where there are none."""
    files = sorted((run / "studies").glob("*.csv"))
    found = pd.concat([pd.read_csv(path, keep_default_na=False) for path in files])
    found = found.drop_duplicates(["cell", "metric", "dataset", "protocol"])
    found = found[
        found.metric.isin(["perplexity", "kl_divergence"])
        & found["transform"].str.contains(SEED)
        & (found.status == "ok")
    ]
    if found.empty:
        return ""
    found = found.assign(name=found["transform"].str.replace(SEED, "", regex=True), value=pd.to_numeric(found.value))
    names = [*several(found), "name", "mitigation", "granularity", "format", "metric"]
    grouped = found.groupby(names, sort=False).value
    rows = [
        [*key, of.size, f"{of.mean():.4g}", f"{of.std():.2g}", f"{of.min():.4g} to {of.max():.4g}"]
        for key, of in grouped
    ]
    return markdown(
        "Spread over seeds",
        ["transform" if name == "name" else name for name in names],
        ["seeds", "mean", "standard deviation over seeds", "range"],
        rows,
    )
