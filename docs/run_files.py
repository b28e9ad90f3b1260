"""Kept records of runs: one archive of CSV files per run, runs/NAME.tar.xz, and the pictures that no
record draws. The documents are built from these alone."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from quantgrid.ground.storage import replacing
from quantgrid.jobs.integrity import read_verified
from quantgrid.plan import subconfig
from quantgrid.reporting.claims.contrasts import DIVERGENCE, LOSS
from quantgrid.reporting.data.costs import read

NUMBERS = ("seconds", "max_rss_mb", "cpu_seconds", "megabytes")  # of a job; empty where not known
ABOUT, JOBS, ITEMS = "about.json", "jobs.csv", "items.parquet"
FOLDERS = ("studies", "comparisons")  # one CSV per study
TESTED = (LOSS, DIVERGENCE)  # metrics whose values of every window are kept
KEY = r"(?<=/)[0-9a-f]{10}(?=/|$)"  # of a step, in the name of its job


def keep(results: Path, archive: Path, config: Mapping[str, Any], commit: str, windows: bool = False) -> None:
    """Write the records of a results folder, each verified, into ``archive``: those of the studies
    of ``config`` that were run, their comparisons, and what every job took; with ``windows`` the loss and
    divergence of every window too, which claims are judged on.

    A study whose records the folder lacks keeps those that the archive has, so that a run may be
    made in parts. The commit of a study is the one at which its records last changed.
    """
    before, said = _read(archive)
    content = {
        str(path.relative_to(results)): read_verified(path)
        for name in config["studies"]
        for path in (results / folder / f"{name}.csv" for folder in FOLDERS)
        if path.is_file()
    }
    again = {name for name in config["studies"] if _studied(name) in content}
    others = {name for name in said["studies"] if name in config["studies"]} - again
    changed = {name for name in again if before.get(_studied(name)) != content[_studied(name)]}
    made = jobs(results)
    if others:
        content |= {name: data for name, data in before.items() if Path(name).stem in others}
        made = _with_earlier(_table(before[JOBS]), made)
    if windows:
        content[ITEMS] = items(results, sorted(again), before.get(ITEMS), _cells(content))
    about = {
        "commits": {name: commit if name in changed else said["commits"][name] for name in sorted(again | others)},
        "models": list(config["models"]),
        "formats": {**said.get("formats", {}), **config.get("formats", {})},
        "named": subconfig.named(config),
        "studies": {
            name: fields if name in again else said["studies"][name]
            for name, fields in config["studies"].items()
            if name in again | others
        },
        "missing": [name for name in config["studies"] if name not in again | others],
    }
    content[JOBS] = made.to_csv(index=False, lineterminator="\n").encode()
    content[ABOUT] = json.dumps(about).encode()
    _write(archive, content)


def _write(archive: Path, content: Mapping[str, bytes]) -> None:
    """Write files by name into an archive; equal files are equal archives."""
    with (
        replacing(archive) as temporary,
        tarfile.open(temporary, "w:xz", preset=9 | lzma.PRESET_EXTREME) as written,
    ):
        for name, data in sorted(content.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            written.addfile(entry, io.BytesIO(data))


def _with_earlier(before: pd.DataFrame, made: pd.DataFrame) -> pd.DataFrame:
    """Jobs of all parts: those ``made`` now, and those ``before`` that were not made again, with the same key or
    another."""
    names = [frame["rule"] + " " + frame["name"].str.replace(KEY, "", regex=True) for frame in (before, made)]
    return pd.concat([before[~names[0].isin(set(names[1]))], made])


def _studied(name: str) -> str:
    return f"{FOLDERS[0]}/{name}.csv"


def _read(archive: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Content of an archive by name, and what it says of the run; nothing if there is none."""
    if not archive.is_file():
        return {}, {"commits": {}, "studies": {}}
    with tarfile.open(archive, "r:xz") as stored:
        content = {entry.name: stored.extractfile(entry).read() for entry in stored}  # type: ignore[union-attr]
    return content, json.loads(content[ABOUT])


def _table(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values={name: [""] for name in NUMBERS})


def _cells(content: Mapping[str, bytes]) -> set[str]:
    """Keys of all cells of the kept studies."""
    return {cell for name in content if Path(name).parent.name == FOLDERS[0] for cell in _table(content[name]).cell}


def items(results: Path, studies: Sequence[str], before: bytes | None, cells: set[str]) -> bytes:
    """Values of the ``TESTED`` metrics in every window as Parquet (cell, metric, dataset, item, value in float32):
    those of the studies of a results folder, and those kept ``before`` of other cells among ``cells``."""
    files = [read_verified(results / FOLDERS[0] / f"{name}.items.parquet") for name in studies]
    parts = [pd.read_parquet(io.BytesIO(content)) for content in [*files, *([before] if before else [])]]
    found = pd.concat(parts).drop_duplicates(["cell", "metric", "dataset", "item"])
    found = found[found.metric.isin(TESTED) & found.cell.isin(cells)].astype({"value": "float32"})
    written = io.BytesIO()
    found.sort_values(["metric", "dataset", "cell", "item"]).to_parquet(
        written,
        index=False,
        use_dictionary=["cell", "metric", "dataset"],
        column_encoding={"value": "BYTE_STREAM_SPLIT"},
        compression="zstd",
    )
    return written.getvalue()


@contextmanager
def kept(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Unpack an archive; yields its folder, laid out as a results folder, and what it says of the
    run (:func:`keep`)."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "r:xz") as stored:
        stored.extractall(scratch, filter="data")
        yield Path(scratch), json.loads((Path(scratch) / ABOUT).read_text())


def jobs(results: Path) -> pd.DataFrame:
    """Costs of every job: rule, name, seconds, max_rss_mb and cpu_seconds; ``megabytes`` of the
    parameters that a job of fit_transform left."""
    found = pd.DataFrame(read(results / "benchmarks"), columns=["rule", "name", *NUMBERS])
    files = [results / "transforms" / name / "transform.safetensors" for name in found.name]
    fits = found.rule == "fit_transform"
    found["megabytes"] = [
        path.stat().st_size / 1e6 if fit and path.is_file() else None for fit, path in zip(fits, files, strict=True)
    ]
    return found
