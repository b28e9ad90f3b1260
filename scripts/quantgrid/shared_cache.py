"""Preparation of what goes into a cache that several folders share. Standard library only.

What is taken from it is verified as any file that a step left: its record (:mod:`.integrity`) lies in the cache with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .integrity import files_of
from .storage import replacing

CACHED_RULES = ("fetch_model", "tokenize_corpus", "calibrate_model", "fit_transform")


def detach(outputs: Iterable[str | Path]) -> None:
    """Put a copy in the place of each link among ``outputs`` and below them. Snakemake makes every file of an entry writable for all, also where a
    link leads; and what a link leads to need not be there, or readable, for another user of the cache."""
    for file in (Path(name) for output in outputs for name in files_of(output)):
        if file.is_symlink():
            with replacing(file) as temporary:
                shutil.copyfile(file, temporary)
