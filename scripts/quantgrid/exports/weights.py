"""Exports as folders of transformers: compressed-tensors, GPTQ, AWQ, dense."""

from __future__ import annotations

from pathlib import Path

import torch

from ..corpora import token_windows
from ..ground.storage import read_json
from .awq import Awq
from .capabilities import VLLM
from .check import Checked, check, require_loader
from .compressed_tensors import CompressedTensors
from .dense import Dense
from .folder import bytes_needed, write_folder
from .gptq import Gptq
from .loaders import Loader, loader_of
from .packer import Packer
from .request import Request, Snippet, Written

PACKERS: dict[str, type[Packer]] = {"compressed-tensors": CompressedTensors, "gptq": Gptq, "awq": Awq, "dense": Dense}


def needed(request: Request) -> int:
    """Bytes that the export takes; raises :class:`ConfigError` if its check cannot run here."""
    require_loader(loader_of(request.target, {}, bool(request.features.branch_inputs) and request.target != "dense"))
    return bytes_needed(request.features, request.target)


def write(request: Request, folder: Path) -> Written:
    """Write the files of the export into ``folder``."""
    packer = PACKERS[request.target](request.features, getattr(torch, request.dtype), request.flags)
    found = write_folder(request.cell, packer, request.model, folder, request.name)
    loader = _loader(request, folder)
    return Written(
        found["bits_per_weight"],
        found["bytes"],
        "transformers",
        () if request.target == "dense" else (request.target,),
        tuple(_snippets(request, loader)),
        found["adapter"],
    )


def verify(request: Request, folder: Path) -> Checked:
    """Check of the files in ``folder`` against the cell."""
    windows, _ = token_windows.load(request.windows, stop=request.about.get("windows"))
    loader = _loader(request, folder)
    return check(folder, request.checkpoint, request.manifest, windows, loader, request.verdict, request.dtype)


def _loader(request: Request, folder: Path) -> Loader:
    return loader_of(request.target, read_json(folder / "config.json"), (folder / "adapter").is_dir())


def _snippets(request: Request, loader: Loader) -> list[Snippet]:
    head = f'folder, dtype = "{request.name}", "{request.verdict.check_dtype}"\n'
    found = [Snippet(loader.name, "python", head + loader.code, True)]
    if VLLM in request.verdict.loaders:
        found.append(Snippet(VLLM, "shell", f"vllm serve {request.name}", False))
    return found
