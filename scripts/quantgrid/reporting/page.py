"""What the report page is built from: a section per study, and the context of the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .. import grid, registry
from ..grid import Cell
from . import costs, distributions
from .collection import cell_key
from .comparisons import read
from .report import StudySection

BESIDE = {"tables": ("csv", "md", "tex"), "figures": ("png", "pdf", "svg", "csv"), "comparisons": ("csv", "md", "tex")}


def section(study: str, config: Mapping[str, Any], records: pd.DataFrame, figure: str | Path | None, base: Path) -> StudySection:
    """One study: its presentation from the config, records, figure, and its comparisons and links to files below ``base`` where these exist."""
    files = {"records, CSV": base / "studies" / f"{study}.csv"}
    files |= {f"{folder[:-1]}, {suffix.upper()}": base / folder / f"{study}.{suffix}" for folder, suffixes in BESIDE.items() for suffix in suffixes}
    links = {what: os.path.relpath(path, base) for what, path in files.items() if path.is_file()}
    compared = base / "comparisons" / f"{study}.csv"
    found = read(compared) if "compare" in config["studies"][study] and compared.is_file() else pd.DataFrame()
    return StudySection({"study": study, **config["studies"][study]}, records, figure, links, None if found.empty else found)


def context(config: Mapping[str, Any], versions: Mapping[str, str], base: Path, missing: Sequence[Mapping[str, Any]] = (),
            losses: str | Path | None = None, drawn: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Models with their provenance, corpora, trained mitigations, versions, costs of the jobs so far, the figure of the ``losses``, those of
    distributions that are ``drawn``, and the whole config."""
    models = [{"name": name, "provenance": entry.get("note", ""), "source": entry.get("package") or entry.get("id") or entry.get("path")}
              for name, entry in config["models"].items()]
    corpora = [{"name": name, **{key: str(value) for key, value in entry.items()}} for name, entry in config["corpora"].items()]
    return {"title": config["report"]["title"], "models": models, "corpora": corpora, "training": trained(config), "config": dict(config),
            "versions": dict(versions), "benchmarks": costs.read(base / "benchmarks"), "missing": list(missing), "losses": losses or "",
            "distributions": shown_distributions(drawn)}


def shown_distributions(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Model, name, caption and path of each figure ``{model}/{name}.svg``."""
    found = [(path.parent.name, path.stem, str(path)) for path in map(Path, paths)]
    return [{"model": model, "name": name, "caption": distributions.caption(name), "path": path} for model, name, path in found]


def trained(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mitigations of all studies that train: what, and how many steps."""
    names = dict.fromkeys(name for study in config["studies"].values() for axis, name, _ in grid.names_in(study) if axis == "mitigations")
    found = []
    for name in names:
        entry = {key: value for key, value in grid.entry(config, "mitigations", name).items() if key not in ("calibration", "seeds")}
        method = registry.method("mitigations", entry["method"])
        if method.training:
            steps = method.resolve(entry, f"mitigations.{name}")["options"]["steps"]
            found.append({"mitigation": name, "method": entry["method"], "trained": method.training, "steps": steps})
    return found


def missing_cells(wanted: Mapping[Cell, Mapping[str, str]], found: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells with an evaluation that does not exist, one entry each, in the form that the report lists."""
    return [{"cell": cell_key(cell), **cell.axes, "reason": "not computed: " + ", ".join(name for name in named if name not in found[cell])}
            for cell, named in wanted.items() if set(named) - set(found[cell])]
