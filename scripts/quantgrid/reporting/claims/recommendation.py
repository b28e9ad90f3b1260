"""Recommended recipes for a model within a limit of bits: the cells of a results folder in order,
and those not significantly different from the best."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ...config.cells import AXES, MIXED
from ...ground.errors import ConfigError, unknown_name
from ...jobs.integrity import verify
from ..data.allocations import BETTER, confirmed
from ..data.collection import read
from ..data.paired import LEVEL, estimate, holm
from ..data.starts import MEANING, WORDS
from ..figures.pareto import BITS, points, recipe
from ..style import significant, with_error
from .served import LEGEND
from .verdicts import LOSS

ORDER = (
    "rank",
    "recipe",
    "bits",
    "added_bits",
    "operations",
    "perplexity",
    "stderr",
    "relative",
    "difference",
    "low",
    "high",
    "p_adjusted",
    "indistinguishable",
    "cell",
    "start_kept",
    "replaces",
    *AXES.values(),
)


def recommended(folder: str | Path, model: str, bits: float, dataset: str = "", advice: str = "") -> pd.DataFrame:
    """:func:`recommend` from a results folder; ``advice`` says what makes missing results."""
    results, items = Path(folder) / "results.csv", sorted(Path(folder).glob("studies/*.items.parquet"))
    if not results.is_file() or not items:
        raise ConfigError(f"{folder}: no results yet; {advice}")
    for path in (results, *items):
        verify(path)
    windows = pd.concat([pd.read_parquet(path) for path in items]).drop_duplicates(
        ["cell", "metric", "dataset", "item"]
    )
    return recommend(read(results), windows, model, bits, dataset)


def recommend(records: pd.DataFrame, items: pd.DataFrame, model: str, bits: float, dataset: str = "") -> pd.DataFrame:
    """Rank the quantized cells of ``model`` with at most ``bits`` stored bits per weight by
    perplexity (``ORDER``).

    ``difference`` is the difference of losses to the best cell (nats per token, paired by window)
    with its 95 % bootstrap interval; a cell is indistinguishable from the best unless the interval
    excludes zero and the Holm-adjusted p-value over the candidates is below 0.05.
    Allocations are left out unless they are shown to be better than the best uniform scheme (:func:`confirmed_only`).
    :class:`ConfigError` for an unknown model or corpus, and if no cell is within the limit.
    """
    if model not in set(records.model):
        raise ConfigError(f"MODEL: {unknown_name('model', model, set(records.model))}")
    own = points(records[records.model == model])
    datasets = list(own.dataset.unique())
    if not datasets or (dataset and dataset not in datasets) or (not dataset and len(datasets) > 1):
        raise ConfigError(
            f"CORPUS: perplexity of '{model}' was measured on {', '.join(datasets) or 'nothing'}; name one of them"
        )
    own = own[own.dataset == (dataset or datasets[0])]
    full = own[own.baseline].perplexity
    found = own[~own.baseline & (own.bits <= bits)].sort_values("perplexity", kind="stable").reset_index(drop=True)
    if found.empty:
        raise ConfigError(
            f"BITS: no cell of '{model}' has at most {bits:g} {BITS.replace('_', ' ')}; the smallest "
            f"has {own.bits.min():.4g}"
        )
    found, replaced = confirmed_only(found, items)
    stderr = records[(records.metric == "perplexity") & (records.dataset == found.dataset[0])].set_index("cell").stderr
    found["stderr"], found["rank"] = found.cell.map(stderr), found.index + 1
    found["relative"] = found.perplexity / full.iloc[0] if len(full) else float("nan")
    found["recipe"] = [recipe(row) for row in found.itertuples()]
    found["replaces"] = [replaced.get(cell, "") for cell in found.cell]
    return compared(found, items)[list(ORDER)]


def confirmed_only(found: pd.DataFrame, items: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """``found`` without allocations whose divergence is not shown to be below that of the best uniform scheme
    of the same transform and mitigation, and cell of that scheme -> recipes that it replaces.

    Divergences are paired by window. An allocation without a uniform cell to compare with stays.
    """
    measured = (items.metric == "kl_divergence") & (items.dataset == found.dataset.iloc[0])
    kept = items[measured & items.cell.isin(found.cell)]
    windows = {cell: part.sort_values("item").value.to_numpy() for cell, part in kept.groupby("cell")}
    dropped, replaced = [], {}
    for row in found[found.granularity == MIXED].itertuples():
        alike = (found["transform"] == row.transform) & (found["mitigation"] == row.mitigation)
        alike &= found["granularity"] != MIXED
        uniform = {cell: windows[cell].mean() for cell in found[alike].cell if cell in windows}
        best = min(uniform, key=uniform.__getitem__, default=None)
        if best is None or confirmed(*estimate([windows[row.cell] - windows[best]])) == BETTER:
            continue
        dropped.append(row.cell)
        replaced[best] = ", ".join(filter(None, [replaced.get(best, ""), row.format]))
    return found[~found.cell.isin(dropped)].reset_index(drop=True), replaced


def compared(found: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Add to ``found`` the paired difference of every cell to the first."""
    kept = items[(items.metric == LOSS) & (items.dataset == found.dataset[0]) & items.cell.isin(found.cell)]
    losses = {cell: part.sort_values("item").value.to_numpy() for cell, part in kept.groupby("cell")}
    if absent := [cell for cell in found.cell if cell not in losses]:
        raise ConfigError(
            f"studies/*.items.parquet: the windows of cell {absent[0]} are missing; run the workflow again"
        )
    estimates = [estimate([losses[cell] - losses[found.cell[0]]]) for cell in found.cell[1:]]
    columns = list(zip(*[(0.0, 0.0, 0.0, 1.0), *estimates]))
    adjusted = [1.0, *holm([p for *_, p in estimates])]
    found = found.assign(difference=columns[0], low=columns[1], high=columns[2], p_adjusted=adjusted)
    decided = (found.p_adjusted < LEVEL) & ~((found.low <= 0) & (found.high >= 0))
    return found.assign(indistinguishable=~decided)


def text(found: pd.DataFrame, title: str, top: int) -> str:
    """Format the first ``top`` lines of a recommendation for a terminal, columns aligned. An
    asterisk marks the best and the cells not significantly different from it; the last line names
    the cheapest of these. A column ``served`` names programs that compute a recipe exactly."""
    head = (
        "",
        "recipe",
        "bits",
        "of these online",
        "online operations",
        "perplexity",
        "of full precision",
        "loss above the best, 95 % interval",
        *["served exactly"] * ("served" in found),
    )
    lines = [head]
    for row in found.head(top).itertuples():
        interval = (
            "–"
            if row.rank == 1
            else f"{significant(row.difference)} ({significant(row.low)} to {significant(row.high)})"
        )
        lines.append(
            (
                f"{row.rank}{'*' if row.indistinguishable else ''}",
                row.recipe,
                f"{row.bits:.3f}",
                f"{row.added_bits:.3f}",
                f"{row.operations:.4g}",
                with_error(row.perplexity, row.stderr),
                f"{row.relative:.3f} ×",
                interval,
                *([row.served or "–"] if "served" in found else []),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    note = f"* the best, or not distinguishable from it (paired by window, Holm over {len(found) - 1} comparisons)"
    starts = [f"{WORDS}: {MEANING}"] if found.head(top).start_kept.any() else []
    legend = [LEGEND] if "served" in found else []
    legend += [
        f"{row.recipe} is in the place of {row.replaces}: the paired test of divergences does not tell them apart."
        for row in found.head(top).itertuples()
        if row.replaces
    ]
    return "\n".join([title, body, note, *legend, *starts, cheapest(found)])


def cheapest(found: pd.DataFrame) -> str:
    """Name the cheapest of the recipes not significantly different from the best: fewest online
    operations, then fewest bits."""
    tied = found[found.indistinguishable]
    if len(tied) == 1:
        return f"{tied.recipe.iloc[0]} is better than all others."
    row = tied.sort_values(["operations", "bits", "rank"], kind="stable").iloc[0]
    return (
        f"Of the {len(tied)} with an asterisk the cheapest to run is {row['rank']}, {row.recipe}: "
        f"{row.operations:.4g} online operations per token, {row.bits:.3f} bits."
    )
