"""Recommended recipes for a model within a limit of bits: the cells of one kind of deployment in
order of their divergence to full precision, and those not significantly different from the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from ...config.cells import AXES, MIXED
from ...config.deployments import Deployment, present
from ...ground.errors import ConfigError, require_named, unknown_name
from ...jobs.integrity import verify
from ..data.allocations import BETTER, confirmed
from ..data.collection import read
from ..data.paired import LEVEL, estimate, holm
from ..figures.pareto import BITS, DIVERGENCE, points

ORDER = (
    "rank",
    "recipe",
    "rounded",
    "online",
    "bits",
    "added_bits",
    "operations",
    "divergence",
    "stderr",
    "perplexity",
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


def read_results(folder: str | Path, advice: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read and verify (records, items) of a results folder; ``advice`` says what makes missing
    results."""
    results, items = Path(folder) / "results.csv", sorted(Path(folder).glob("studies/*.items.parquet"))
    if not results.is_file() or not items:
        raise ConfigError(f"{folder}: no results yet; {advice}")
    for path in (results, *items):
        verify(path)
    return read(results), joined(items)


def joined(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read the per-window and per-sample values of several studies, those of a shared cell once."""
    found = pd.concat([pd.read_parquet(path) for path in paths])
    return found.drop_duplicates(["cell", "metric", "dataset", "item"])


def candidates(records: pd.DataFrame, formats: Mapping[str, Any], model: str, dataset: str = "") -> pd.DataFrame:
    """List the quantized cells of ``model`` on one corpus, as rows of :func:`pareto.points` with
    ``stderr`` and ``relative`` (perplexity divided by that of full precision).

    :class:`ConfigError` for a model or corpus that is unknown, or not named where there are several.
    """
    require_named("MODEL", model, list(dict.fromkeys(records.model)))
    if model not in set(records.model):
        raise ConfigError(f"MODEL: {unknown_name('model', model, set(records.model))}")
    own = points(records[records.model == model], formats)
    datasets = list(own.dataset.unique())
    if not datasets:
        raise ConfigError(f"MODEL: no cell of '{model}' was evaluated; its divergence was measured on nothing")
    if dataset not in datasets and (dataset or len(datasets) > 1):
        raise ConfigError(
            f"CORPUS: '{model}' was measured on {', '.join(datasets)}; name one of them, as in CORPUS={datasets[0]}"
        )
    own = own[own.dataset == (dataset or datasets[0])]
    full = own[own.baseline].perplexity
    errors = records[(records.metric == DIVERGENCE) & (records.dataset == own.dataset.iloc[0])].set_index("cell").stderr
    own = own.assign(stderr=own.cell.map(errors), relative=own.perplexity / (full.iloc[0] if len(full) else np.nan))
    return own[~own.baseline].reset_index(drop=True)


def kinds(cells: pd.DataFrame) -> list[Deployment]:
    """List the kinds of deployment of some :func:`candidates`."""
    return present(zip(cells.rounded, cells.online))


def within(cells: pd.DataFrame, kind: Deployment, bits: float) -> pd.DataFrame:
    """Select the :func:`candidates` of one kind with at most ``bits`` stored bits per weight."""
    fits = pd.Series(map(kind.holds, cells.rounded, cells.online), cells.index, dtype=bool)
    return cells[fits & (cells.bits <= bits)]


def recommend(cells: pd.DataFrame, items: pd.DataFrame, kind: Deployment, bits: float) -> pd.DataFrame:
    """Rank the :func:`candidates` of one kind of deployment with at most ``bits`` stored bits per weight
    by divergence (``ORDER``).

    ``difference`` is the difference of divergences to the best cell (nats per token, paired by window)
    with its 95 % t-interval; a cell is indistinguishable from the best unless the paired t-test,
    Holm-adjusted over the candidates, has a p-value below 0.05. :class:`ConfigError` if no cell is
    of this kind and within the limit.
    """
    own = within(cells, kind, float("inf"))
    if own.empty:
        names = ", ".join(found.name for found in kinds(cells))
        raise ConfigError(
            f"DEPLOYMENT: no cell of '{cells.model.iloc[0]}' is for {kind.name} ({kind.title}); there are {names}"
        )
    found = within(cells, kind, bits).sort_values("divergence", kind="stable").reset_index(drop=True)
    if found.empty:
        raise ConfigError(
            f"BITS: no cell of '{cells.model.iloc[0]}' for {kind.name} has at most {bits:g} {BITS.replace('_', ' ')}; "
            f"the smallest has {own.bits.min():.4g}"
        )
    found, replaced = confirmed_only(found, items)
    found["rank"], found["replaces"] = found.index + 1, [replaced.get(cell, "") for cell in found.cell]
    return compared(found, items)[list(ORDER)]


def confirmed_only(found: pd.DataFrame, items: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """``found`` without allocations whose divergence is not shown to be below that of the best uniform scheme
    of the same transform and mitigation, and cell of that scheme -> recipes that it replaces.

    Divergences are paired by window, p-values Holm-adjusted over the allocations. An allocation without a
    uniform cell to compare with stays.
    """
    measured = (items.metric == "kl_divergence") & (items.dataset == found.dataset.iloc[0])
    kept = items[measured & items.cell.isin(found.cell)]
    windows = {cell: part.sort_values("item").value.to_numpy() for cell, part in kept.groupby("cell")}
    rivals, tests = {}, []
    for row in found[found.granularity == MIXED].itertuples():
        alike = (found["transform"] == row.transform) & (found["mitigation"] == row.mitigation)
        alike &= found["granularity"] != MIXED
        uniform = {cell: windows[cell].mean() for cell in found[alike].cell if cell in windows}
        if uniform:
            rivals[row.cell, row.format] = min(uniform, key=uniform.__getitem__)
            tests.append(estimate([windows[row.cell] - windows[rivals[row.cell, row.format]]]))
    dropped, replaced = [], {}
    for ((cell, name), best), (*about, _), p in zip(rivals.items(), tests, holm([p for *_, p in tests])):
        if confirmed(*about, p) != BETTER:
            dropped.append(cell)
            replaced[best] = ", ".join(filter(None, [replaced.get(best, ""), name]))
    return found[~found.cell.isin(dropped)].reset_index(drop=True), replaced


def compared(found: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Add to ``found`` the paired difference of every cell to the first."""
    kept = items[(items.metric == DIVERGENCE) & (items.dataset == found.dataset[0]) & items.cell.isin(found.cell)]
    values = kept.sort_values("item").groupby("cell").value.agg(list).to_dict()
    if absent := [cell for cell in found.cell if cell not in values]:
        raise ConfigError(
            f"studies/*.items.parquet: the windows of cell {absent[0]} are missing; run the workflow again"
        )
    differences = np.array([values[cell] for cell in found.cell]) - values[found.cell[0]]
    means, count = differences.mean(1), differences.shape[1]
    errors = differences.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(means), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(errors > 0, 2 * stdtr(count - 1, -np.abs(means) / errors), (means == 0).astype(float))
    margin = errors * stdtrit(count - 1, 0.975) if count > 1 else errors
    adjusted = [1.0, *holm(p[1:].tolist())]
    found = found.assign(difference=means, low=means - margin, high=means + margin, p_adjusted=adjusted)
    return found.assign(indistinguishable=found.p_adjusted >= LEVEL)


def cheapest(found: pd.DataFrame) -> pd.Series:
    """Select the cheapest of the recipes not significantly different from the best, which may be the best
    itself: fewest online operations, then fewest bits."""
    tied = found[found.indistinguishable]
    return tied.sort_values(["operations", "bits", "rank"], kind="stable").iloc[0]


def limit(given: str, cells: pd.DataFrame) -> float:
    """Parse a limit of bits; :class:`ConfigError` names the range of the cells' bits."""
    span = f"the recipes of '{cells.model.iloc[0]}' have {cells.bits.min():.4g} to {cells.bits.max():.4g} stored bits"
    if not given:
        raise ConfigError(f"BITS: no limit is named; name one, as in BITS={cells.bits.min() + 0.5:.1f}; {span}")
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"BITS: '{given}' is not a number; {span}") from None
