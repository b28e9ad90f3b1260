"""Preparation of outputs for a cache that several folders share. Standard library only.

Files from the cache are verified like any output of a step: the cache holds their records
(:mod:`.integrity`) as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ..ground.storage import replacing
from .integrity import files_of

CACHED_RULES = ("fetch_model", "tokenize_corpus", "calibrate_model", "measure_sensitivity", "fit_transform")


def detach(outputs: Iterable[str | Path]) -> None:
    """Replace each link among ``outputs`` and below them by a copy. Snakemake makes every file of a
    cache entry writable for all and follows links; and the target of a link may be missing or
    unreadable for another user of the cache."""
    for file in (Path(name) for output in outputs for name in files_of(output)):
        if file.is_symlink():
            with replacing(file) as temporary:
                shutil.copyfile(file, temporary)
