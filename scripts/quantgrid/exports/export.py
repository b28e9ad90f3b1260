"""Export of one cell: verdict, files, check, card. The folder appears when all of it holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ..ground.errors import ConfigError, NumericalFailure
from ..ground.provenance import versions
from ..ground.storage import read_json, write_json, write_text
from .adapter import FOLDER as ADAPTER_FOLDER
from .card import adapter_card, card
from .check import Checked
from .folder import digests, reject, require_absent, require_disk, staged
from .packed_cell import PackedCell
from .request import Request, Written
from .targets import AUTO, dtype_of, judge, target_of

RECORD, REPORT, CARD = "quantgrid.yaml", "export.json", "README.md"


def export(
    model_folder: str | Path,
    checkpoint_folder: str | Path,
    manifest: str | Path | None,
    windows: str | Path,
    target: str,
    out: str | Path,
    flags: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
    dtype: str = AUTO,
) -> dict[str, Any]:
    """Write a cell for ``target`` into the new folder ``out`` and check it; returns export.json.

    Arguments are those of :class:`~quantgrid.exports.request.Request`. Raises :class:`ConfigError` if
    the target cannot hold the cell, if ``out`` exists, if the disk is too small or the check cannot run
    here; and if the check fails: the folder is then left as ``out`` + ``.rejected``.
    """
    out = Path(out)
    require_absent(out)
    cell = PackedCell(checkpoint_folder, manifest)
    features, wanted = cell.features(), dtype_of(target, dtype)
    request = Request(
        Path(model_folder),
        Path(checkpoint_folder),
        None if manifest is None else Path(manifest),
        Path(windows),
        target,
        (about or {}).get("name") or out.name,
        wanted,
        frozenset(flags),
        cell,
        features,
        judge(target, features, wanted, flags),
        about or {},
    )
    if request.verdict.refusals:
        raise ConfigError(f"{target} cannot hold the cell: {'; '.join(request.verdict.refusals)}")
    route = import_module(f".{target_of(target).route}", __package__)
    require_disk(out, route.needed(request))
    with staged(out) as folder:
        written = route.write(request, folder)
        try:
            checked = route.verify(request, folder)
        except NumericalFailure as failure:
            raise ConfigError(f"{out}: the check of the export failed: {failure}") from None
        report = _finish(request, folder, written, checked)
        if not checked.is_accepted:
            place = reject(folder, out)
            raise ConfigError(
                f"{out}: {checked.loader} computes other logits than the cell: KL {checked.kl:.2g} nats per token, "
                f"largest difference {checked.max_logit_difference:.2g}, accepted: {_accepted(checked)}; "
                f"{''.join(f'{line}; ' for line in checked.lines())}"
                f"the folder is left as {place}"
            )
    return report


def _accepted(checked: Checked) -> str:
    return f"KL {checked.kl_accepted:.2g}" if checked.kl_accepted else "equal logits"


def _finish(request: Request, folder: Path, written: Written, checked: Checked) -> dict[str, Any]:
    """Write the record, the card and the report; returns the report."""
    write_text(folder / CARD, card(request, written, checked))
    if written.adapter:
        write_text(folder / ADAPTER_FOLDER / CARD, adapter_card(request))
    write_text(folder / RECORD, yaml.safe_dump(_record(request), sort_keys=False, allow_unicode=True))
    verdict = request.verdict
    report = {
        "target": request.target,
        "dtype": request.dtype,
        "verdict": {
            "kind": verdict.kind,
            "bounds": list(verdict.bounds),
            "losses": list(verdict.losses),
            "loaders": list(verdict.loaders),
            "excluded": dict(verdict.excluded),
            "notes": list(verdict.notes),
        },
        "bits_per_weight": written.bits_per_weight,
        "bytes": written.bytes,
        "check": checked.to_dict(),
        "sha256": digests(folder),
    }
    write_json(folder / REPORT, report)
    return report


def _record(request: Request) -> dict[str, Any]:
    """Content of quantgrid.yaml: the cell, its config, what it was made from, versions."""
    made, about = request.cell.about, request.about
    source = _provenance(request.model)
    found = {
        "cell": about.get("cell"),
        "key": about.get("key"),
        "axes": made.get("axes"),
        "config": about.get("config"),
        "calibration": about.get("calibration"),
        "schemes": made["schemes"],
        "target": request.target,
        "dtype": request.dtype,
        "flags": sorted(request.flags),
        "model": source,
        "checkpoint_sha256": made["sha256"],
        "inputs": made.get("inputs"),
        "seed": made.get("seed"),
        "versions": made.get("versions"),
        "exported_with": versions("torch", "transformers", "safetensors"),
    }
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _provenance(model: Path) -> dict[str, Any]:
    """Origin of the unquantized model, without paths of this machine."""
    path = model / "provenance.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    source = {key: value for key, value in (found.get("source") or {}).items() if key != "path"}
    kept = {key: found[key] for key in ("commit", "weights_sha256", "note") if found.get(key)}
    return {"source": source, **kept}
