"""One export: a cell, a target, and what the caller knows of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .features import Features
from .packed_cell import PackedCell
from .verdicts import Verdict


@dataclass(frozen=True)
class Request:
    """One export.

    ``model`` is the canonical folder of the unquantized model, ``checkpoint`` the folder of the cell's
    packed checkpoint with its ``manifest`` (None: in that folder), ``windows`` a file of token windows.
    ``name`` is that of the finished folder, ``dtype`` the dtype of the exported model.

    ``about`` is what the caller knows, all optional: ``name`` (of the folder), ``cell``, ``model`` (names),
    ``entry`` (the model's entry of the config: source, id, revision), ``license``, ``license_name``,
    ``license_link`` and ``language`` (of the model), ``config`` (excerpt of the config, any mapping),
    ``key`` (of the checkpoint), ``calibration`` (entry of the calibration corpus), ``results``: rows
    ``{metric, corpus, value, stderr, full_precision, protocol}``.
    """

    model: Path
    checkpoint: Path
    manifest: Path | None
    windows: Path
    target: str
    name: str
    dtype: str
    flags: frozenset[str]
    cell: PackedCell
    features: Features
    verdict: Verdict
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """Name of the unquantized model on the hub; None for local and shipped models."""
        entry = self.about.get("entry") or {}
        return entry.get("id") if entry.get("source") == "hub" else None


@dataclass(frozen=True)
class Snippet:
    """Code of a card: a ``title``, the ``language``, the ``code``; ``was_run``: the check ran it."""

    title: str
    language: str
    code: str
    was_run: bool


@dataclass(frozen=True)
class Written:
    """Result of writing the files of an export.

    ``bits_per_weight`` of the rounded linears (None: none is rounded), ``bytes`` of the tensors,
    ``library`` and ``tags`` of the hub card, ``snippets`` that load the export. ``adapter``: there is an
    adapter folder.
    """

    bits_per_weight: float | None
    bytes: int
    library: str
    tags: tuple[str, ...]
    snippets: tuple[Snippet, ...]
    adapter: bool = False
