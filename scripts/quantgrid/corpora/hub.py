"""Commits of data sets on the Hugging Face hub: branches and tags may change their content."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from ..ground.errors import shortened


def with_commit(entry: Mapping[str, Any], where: str = "corpus") -> dict[str, Any]:
    """Add the ``commit`` of its revision to a corpus entry.

    If the hub cannot be reached the entry is unchanged, with a note on stderr.
    """
    if re.fullmatch("[0-9a-f]{40}", entry.get("revision") or ""):
        return {**entry, "commit": entry["revision"]}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(entry["id"], revision=entry.get("revision")).sha
    # a cached data set can be read offline; others fail when they are read
    except Exception as error:
        print(f"{where}: no commit is recorded, the hub cannot be reached ({shortened(str(error))})", file=sys.stderr)
        return dict(entry)
    print(f"{where}: revision {entry.get('revision') or 'main'} is commit {commit}", file=sys.stderr)
    return {**entry, "commit": commit}
