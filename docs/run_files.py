"""Kept records of runs: one archive of CSV files per run, runs/NAME.zip, and the pictures that no
record draws. The documents are built from these alone."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from quantgrid.ground.storage import replacing
from quantgrid.jobs.integrity import read_verified
from quantgrid.reporting.data.costs import read

NUMBERS = ("seconds", "max_rss_mb", "cpu_seconds", "megabytes")  # of a job; empty where not known
ABOUT, JOBS, CLAIMS = "about.json", "jobs.csv", "claims.csv"
FOLDERS = ("studies", "comparisons")  # one CSV per study
SAME_DATE = (1980, 1, 1, 0, 0, 0)  # equal records are equal archives


def keep(results: Path, archive: Path, about: Mapping[str, Any]) -> None:
    """Write the records of a results folder, each verified, into ``archive``: those of every study,
    its comparisons, the verdicts on claims, and what every job took. ``about`` is what else the
    page needs: the commit, and models and studies of the config at that commit."""
    files = [path for folder in FOLDERS for path in sorted((results / folder).glob("*.csv"))]
    content = {str(path.relative_to(results)): read_verified(path) for path in [*files, results / CLAIMS]}
    content[JOBS] = jobs(results).to_csv(index=False, lineterminator="\n").encode()
    content[ABOUT] = json.dumps(about).encode()
    with replacing(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as written:
        for name, data in sorted(content.items()):
            written.writestr(zipfile.ZipInfo(name, SAME_DATE), data, zipfile.ZIP_LZMA)


@contextmanager
def kept(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Unpack an archive; yields its folder, laid out as a results folder, and what it says of the
    run (:func:`keep`)."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(archive) as stored:
        stored.extractall(scratch)
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
