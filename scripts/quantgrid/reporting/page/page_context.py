"""Context of the report page: a section per study, and the data of the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...config import entries, grid, registry
from ...config.cells import Cell
from ...evaluation.protocols import described
from ...jobs.integrity import sound
from ...models.counts import all_weights
from ..claims import served
from ..data import allocations, collection, published
from ..data.evaluation_rows import cell_key, measured_tasks
from ..figures import allocations as figure_of_bits
from ..figures import distributions, number_lines, pareto, residual_error
from ..tables import comparisons
from .study_sections import StudySection

# cell -> name of the evaluation -> its JSON, for one study
Found = Mapping[Cell, Mapping[str, Mapping[str, Any]]]
BESIDE = {"tables": ("csv", "md", "tex"), "figures": ("png", "pdf", "svg", "csv"), "comparisons": ("csv", "md", "tex")}


def section(
    study: str,
    config: Mapping[str, Any],
    records: pd.DataFrame,
    figure: str | Path | None,
    base: Path,
    races: Sequence[Mapping[str, Any]] = (),
) -> StudySection:
    """Build the section of one study: its presentation from the config, records, figure,
    comparisons, links to existing files below ``base``, the published numbers of the paper's
    table that it names, and its ``races``."""
    spec = {"study": study, **config["studies"][study]}
    files = {"records, CSV": base / "studies" / f"{study}.csv"}
    files |= {
        f"{folder[:-1]}, {suffix.upper()}": base / folder / f"{study}.{suffix}"
        for folder, suffixes in BESIDE.items()
        for suffix in suffixes
    }
    links = {what: os.path.relpath(path, base) for what, path in files.items() if path.is_file()}
    compared = base / "comparisons" / f"{study}.csv"
    found = comparisons.read(compared) if "compare" in spec and sound(compared) else pd.DataFrame()
    return StudySection(
        spec,
        records,
        figure,
        links,
        None if found.empty else found,
        published.with_measured(records, spec, config, published.read()),
        races,
    )


def context(
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    benchmarks: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Found],
    missing: Sequence[Mapping[str, Any]] = (),
    losses: str | Path | None = None,
    drawn: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Build the context: models with their provenance, corpora, trained mitigations, protocol and
    hashes from the ``evaluations`` of every study, versions, costs of the jobs so far
    (``benchmarks``, from ``costs.read``), the figure of the ``losses``, the figures of
    distributions (``drawn``), and the whole config."""
    models = [
        {
            "name": name,
            "provenance": entry.get("note", ""),
            "source": entry.get("package")
            or entry.get("id")
            or entry.get("path")
            or f"{entry['source']}, {entry.get('name', name)}",
            **size(config, name),
        }
        for name, entry in config["models"].items()
    ]
    corpora = [
        {"name": name, **{key: str(value) for key, value in entry.items()}} for name, entry in config["corpora"].items()
    ]
    return {
        "title": config["report"]["title"],
        "models": models,
        "corpora": corpora,
        "training": trained(config),
        "served": served.recipes(config),
        "allocated": allocations.lines(config, evaluations),
        "config": dict(config),
        "versions": dict(versions),
        "benchmarks": list(benchmarks),
        "missing": list(missing),
        "losses": losses or "",
        "distributions": shown_distributions(drawn),
        "protocol": protocol(evaluations),
        "hashes": hashes(evaluations),
    }


def size(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Summarize a model's shape: weights of the linears of its layers, layers, width,
    vocabulary."""
    shape = entries.shape(config, model)
    return {
        "weights of linears, millions": f"{all_weights(shape) / 1e6:.1f}",
        "layers": shape.layers,
        "width": shape.hidden_size,
        "vocabulary": shape.vocabulary,
    }


def shown_distributions(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """List model, name, caption, path and links of each figure
    ``distributions/{model}/{name}.svg``."""
    found = [(path.parent.name, path.stem, str(path)) for path in map(Path, paths)]
    return [
        {
            "model": model,
            "name": name,
            "caption": distributions.caption(name),
            "path": path,
            "links": {suffix.upper(): f"distributions/{model}/{name}.{suffix}" for suffix in BESIDE["figures"]},
        }
        for model, name, path in found
    ]


def trained(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the trained mitigations of all studies: the trained parameters and the number of
    steps."""
    names = dict.fromkeys(
        name for study in config["studies"].values() for axis, name, _ in grid.names_in(study) if axis == "mitigations"
    )
    found = []
    for name in names:
        entry = {
            key: value
            for key, value in entries.entry(config, "mitigations", name).items()
            if key not in ("calibration", "seeds")
        }
        method = registry.method("mitigations", entry["method"])
        if method.training:
            steps = method.resolve(entry, f"mitigations.{name}")["options"]["steps"]
            found.append({"mitigation": name, "method": entry["method"], "trained": method.training, "steps": steps})
    return found


def overview(
    front: str | Path, lines: str | Path, growth: str | Path | None, base: Path, allocated: str | Path | None = None
) -> list[dict[str, Any]]:
    """List the figures of the whole run (paths of their .svg) with caption and links to their files
    below ``base``."""
    figures = [
        ("pareto", "Divergence and bits", pareto.CAPTION, front),
        ("number-lines", "Four number formats", number_lines.CAPTION, lines),
    ]
    figures += (
        [("residual-error", "Error of the residual stream over the layers", residual_error.CAPTION, growth)]
        if growth
        else []
    )
    figures += [("bits", "Bits of allocations", figure_of_bits.CAPTION, allocated)] if allocated else []
    return [
        {
            "id": name,
            "title": title,
            "caption": caption,
            "image": str(path),
            "links": {
                suffix.upper(): os.path.relpath(Path(path).with_suffix(f".{suffix}"), base)
                for suffix in BESIDE["figures"]
            },
        }
        for name, title, caption, path in figures
    ]


def protocol(evaluations: Sequence[Found]) -> dict[str, str]:
    """Describe the protocol of each corpus and task; one line per model if they differ (as their
    tokenizers do)."""
    found: dict[tuple[str, str], str] = {}
    for study in evaluations:
        for line in (
            collection.protocols_of(study).drop_duplicates(["model", "metric", "dataset", "protocol"]).itertuples()
        ):
            found[line.dataset, line.model] = described(line.protocol)
    named: dict[str, str] = {}
    for (dataset, model), text in found.items():
        alike = {other for (name, _), other in found.items() if name == dataset}
        named[dataset if len(alike) == 1 else f"{dataset}, {model}"] = text
    return named


def hashes(evaluations: Sequence[Found]) -> dict[str, str]:
    """List the sha256 of the weights of every model, of the text of every corpus, and of the
    documents of tasks, as recorded by the evaluations."""
    models, corpora, tasks = {}, {}, {}
    for cell, found in (item for study in evaluations for item in study.items()):
        for content in found.values():
            weights = content.get("model", {}).get("weights_sha256", {})
            models |= {
                f"model {cell.model}" + (f", {file}" if len(weights) > 1 else ""): digest
                for file, digest in weights.items()
            }
            if "corpus" in content:
                corpora[f"corpus {content['corpus']['corpus']}"] = content["corpus"]["text_sha256"]
            tasks |= {
                f"task {name}": result["documents_sha256"]
                for name, result in measured_tasks(content).items()
                if result["documents_sha256"]
            }
    return {**models, **corpora, **tasks}


def missing_cells(
    wanted: Mapping[Cell, Mapping[str, str]], found: Mapping[Cell, Mapping[str, Any]], damaged: Mapping[str, str]
) -> list[dict[str, Any]]:
    """List the cells with an evaluation that is missing or ``damaged`` (path -> fault), one entry
    each, in the form used by the report."""
    missing = []
    for cell, named in wanted.items():
        absent = [name for name, path in named.items() if name not in found[cell] and path not in damaged]
        reasons = [f"not computed: {', '.join(absent)}"] * bool(absent) + [
            damaged[path] for path in named.values() if path in damaged
        ]
        if reasons:
            missing.append({"cell": cell_key(cell), **cell.axes, "reason": "; ".join(reasons)})
    return missing
