"""Export as a GGUF file for llama.cpp: the steps that ``export.py`` calls."""

from __future__ import annotations

from pathlib import Path

from ..corpora import token_windows
from .folder import copy_licenses
from .gguf import file_name, file_type, write_gguf
from .gguf_capabilities import LLAMA_CPP, block_for
from .gguf_check import LOADER, GGUFChecked, check_gguf, probe_python
from .gguf_tokenizer import read_tokenizer
from .request import Request, Snippet, Written

_CONTEXT, _THREADS, _MARGIN = 2048, 4, 1.1  # tokens and threads of the snippet; of the estimate
_HUB = "https://huggingface.co/"


def needed(request: Request) -> int:
    """Bytes that the export takes; raises :class:`ConfigError` if its check cannot run here."""
    probe_python()
    shape, weight = request.features.shape, request.features.schemes.weight
    block = block_for(weight, request.name)
    per_weight = 2.0 if block is None else block.bits / 8 + 4 / block.group
    sizes = ((shape.linear_size(role), count) for plan, count in shape.plans() for role in plan.linears)
    total = sum(rows * columns * count for (rows, columns), count in sizes) * per_weight
    return int(_MARGIN * (total + 2 * 2 * shape.vocabulary * shape.hidden_size))


def write(request: Request, folder: Path) -> Written:
    """Write the file and the licences of the model into ``folder``."""
    cell, name = request.cell, file_name(_name(request), request.cell)
    tokenizer = read_tokenizer(request.model, cell.shape.vocabulary)
    size = write_gguf(folder / name, cell, tokenizer, general_keys(request))
    copy_licenses(request.model, folder)
    head = f'path, context, threads = "{request.name}/{name}", {_CONTEXT}, {_THREADS}\n'
    return Written(
        _bits_per_weight(request),
        size,
        "gguf",
        ("gguf", file_type(cell)),
        (
            Snippet("xllamacpp", "python", head + LOADER, True),
            Snippet(LLAMA_CPP, "shell", f"llama-server -m {request.name}/{name}", False),
        ),
    )


def verify(request: Request, folder: Path) -> GGUFChecked:
    """Check of the file in ``folder`` against the cell."""
    windows, _ = token_windows.load(request.windows, stop=request.about.get("windows"))
    (path,) = folder.glob("*.gguf")
    return check_gguf(path, request.cell, request.model, windows, request.verdict)


def general_keys(request: Request) -> dict[str, str]:
    """Keys ``general.*`` of the file: name, description, licence, and the model that was quantized."""
    about, entry = request.about, request.about.get("entry") or {}
    found = {
        "name": _name(request),
        "description": f"quantgrid {about['cell']}" if about.get("cell") else "",
        "license": about.get("license") or "",
    }
    if request.hub_id is not None:
        organization, _, name = request.hub_id.rpartition("/")
        found |= {
            "base_model.0.name": name,
            "base_model.0.organization": organization,
            "base_model.0.version": entry.get("revision") or "",
            "base_model.0.repo_url": f"{_HUB}{request.hub_id}",
        }
    return {key: value for key, value in found.items() if value}


def _name(request: Request) -> str:
    return request.about.get("model") or request.name


def _bits_per_weight(request: Request) -> float | None:
    """Stored bits per weight of the rounded linears in the cell."""
    shape, schemes = request.features.shape, request.features.schemes
    if schemes.weight is None:
        return None
    sizes = [
        (shape.linear_size(role), count) for plan, count in shape.plans() for role in plan.linears_of(schemes.linears)
    ]
    weights = sum(rows * columns * count for (rows, columns), count in sizes)
    bits = sum(schemes.weight.bits_per_element(size) * size[0] * size[1] * count for size, count in sizes)
    return bits / weights
