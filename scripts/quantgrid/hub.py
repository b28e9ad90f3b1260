"""Commits of data sets on the Hugging Face hub: a branch or a tag may name other content later."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from .errors import shortened


def with_commit(entry: Mapping[str, Any], where: str = "corpus") -> dict[str, Any]:
    """A corpus entry with the ``commit`` of its revision; without, and with a word, where the hub cannot be asked."""
    if re.fullmatch("[0-9a-f]{40}", entry.get("revision") or ""):
        return {**entry, "commit": entry["revision"]}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(entry["id"], revision=entry.get("revision")).sha
    except Exception as error:  # a cached data set can be read offline, another is refused when it is read
        print(f"{where}: no commit is recorded, the hub was not asked ({shortened(str(error))})", file=sys.stderr)
        return dict(entry)
    print(f"{where}: revision {entry.get('revision') or 'main'} is commit {commit}", file=sys.stderr)
    return {**entry, "commit": commit}
