"""What goes into a cache that several folders share, and whether what is taken from it is still what was stored. Standard library only.

A job that fills the cache leaves the sha256 of what it wrote in ``checksums/`` of the cache, one empty file per digest; a job that reads a file
of the cache, or a folder of such files, first looks whether their digests are among them. Files outside of the cache are not looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import ConfigError
from .storage import replacing, sha256_of

CHECKSUMS = "checksums"
CACHED_RULES = ("fetch_model", "tokenize_corpus", "calibrate_model", "fit_transform")


def files_of(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Those of ``paths`` that are files, and what lies in those that are folders; links that lead nowhere are among them."""
    for path in paths:
        if os.path.isdir(path):
            yield from (Path(folder, name) for folder, _, names in os.walk(path) for name in sorted(names))
        elif os.path.lexists(path):
            yield Path(path)


def detach(files: Iterable[Path]) -> None:
    """Put a copy in the place of each of ``files`` that is a link. Snakemake makes every file of an entry writable for all, also where a link leads;
    and what a link leads to need not be there, or readable, for another user of the cache."""
    for file in files:
        if file.is_symlink():
            with replacing(file) as temporary:
                shutil.copyfile(file, temporary)


def remember(cache: str | Path, files: Iterable[Path]) -> None:
    """Note the digests of ``files`` in ``cache``; whoever may write into the cache may write there."""
    folder = Path(cache, CHECKSUMS)
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(Path(cache).stat().st_mode & 0o7777)
    for file in files:
        (folder / sha256_of(file)).touch()


def verify(cache: str | Path, paths: Iterable[str | Path]) -> None:
    """:class:`ConfigError` if a file of ``paths`` is a link into ``cache`` that leads nowhere, or to what was not stored there."""
    stored = Path(cache).resolve()
    for path in paths:
        for file in files_of([path]):
            entry = Path(os.path.realpath(file))
            if entry.is_relative_to(stored) and not (entry.is_file() and (stored / CHECKSUMS / sha256_of(entry)).is_file()):
                wrong = "is damaged: it is not what was stored" if entry.is_file() else "is gone"
                whole = stored / entry.relative_to(stored).parts[0]
                places = f"{whole} and {path}" if os.path.isdir(path) else str(whole)
                raise ConfigError(f"{file}: its copy in the cache, {entry}, {wrong}; delete {places} and run again")
