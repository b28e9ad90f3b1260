"""README.md of an export, as a card of the hub: https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ..models.plans import LINEARS
from ..schemes.quant_scheme import QuantScheme
from .check import Checked
from .request import Request, Snippet, Written

_URL = "https://huggingface.co/"


def card(request: Request, written: Written, checked: Checked | None) -> str:
    """Text of the card; without ``checked`` it says that the export was not checked."""
    parts = [
        _head(request, written),
        f"# {request.name}\n\n{_origin(request)} {_recipe(request)}",
        "## What is rounded\n\n" + _bullets(_rounded(request, written)),
        _results(request.about.get("results") or ()),
        "## Check of this export\n\n" + _check(request, checked),
        "## Loading\n\n" + "\n\n".join(_snippet(snippet) for snippet in written.snippets),
        _losses(request),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def adapter_card(request: Request) -> str:
    """Text of the card of the adapter folder of an export."""
    head = {
        **_license(request),
        "base_model": request.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "quantgrid"],
    }
    return (
        f"{_yaml(head)}\n\n# Low-rank terms of {request.name}\n\nTerms that correct the rounding of the weights in the "
        "folder above. They belong to these weights alone. Load them as the card of that folder says: with PEFT, after "
        "one forward pass of the model. Adapters over packed weights were not checked in vLLM.\n"
    )


def _head(request: Request, written: Written) -> str:
    found: dict[str, Any] = dict(_license(request))
    if request.hub_id is not None:
        found |= {"base_model": request.hub_id, "base_model_relation": "quantized"}
    if request.about.get("language"):
        found["language"] = request.about["language"]
    found |= {
        "library_name": written.library,
        "pipeline_tag": "text-generation",
        "tags": [*written.tags, *_scheme_tags(request), "quantgrid"],
    }
    return _yaml(found)


def _license(request: Request) -> dict[str, Any]:
    keys = ("license", "license_name", "license_link")
    return {key: request.about[key] for key in keys if request.about.get(key)}


def _yaml(content: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(content), sort_keys=False)}---"


def _scheme_tags(request: Request) -> list[str]:
    weights, bits = request.features.schemes.weights, [scheme.element_format.bits for scheme in _inputs(request)]
    inputs = max(bits) if bits else 16
    sizes = dict.fromkeys(f"w{weight.element_format.bits}a{inputs}" for weight in weights)
    return [*sizes, *dict.fromkeys(weight.element for weight in weights)]


def _inputs(request: Request) -> list[QuantScheme]:
    found = (scheme for schemes in request.features.schemes.activation.values() for scheme in schemes)
    return list(dict.fromkeys(found))


def _origin(request: Request) -> str:
    name = request.about.get("model") or request.features.shape.architecture
    base = f"[{request.hub_id}]({_URL}{request.hub_id})" if request.hub_id else name
    return f"{base}, quantized by quantgrid and written for {request.target}."


def _recipe(request: Request) -> str:
    axes = request.cell.about.get("axes") or {}
    named = [
        f"{axis} `{axes[axis]}`" for axis in ("transform", "mitigation", "format", "granularity") if axes.get(axis)
    ]
    cell = request.about.get("cell")
    return f"Recipe{f' (`{cell}`)' if cell else ''}: {', '.join(named) or 'not named by the caller'}."


def scheme_text(scheme: QuantScheme, row: str) -> str:
    """A scheme in words, such as ``int4, symmetric, bf16 scales, group of 64``; ``row`` names what a
    row of the tensor is."""
    per = row if scheme.granularity == "channel" else scheme.granularity
    size = f"group of {scheme.group_size}" if scheme.group_size else f"one scale per {per}"
    found = [scheme.element, "symmetric" if scheme.symmetric else "asymmetric", f"{scheme.scale_format} scales", size]
    if scheme.global_scale != "none":
        static = scheme.global_scale == "static"
        found.append("a static global scale" if static else f"global scale per {scheme.global_scale}")
    return ", ".join(found)


def _rounded(request: Request, written: Written) -> Iterable[str]:
    schemes = request.features.schemes
    kept = ", ".join(linear for linear in LINEARS if linear not in schemes.linears)
    if not schemes.weights:
        yield "no weight is rounded"
    else:
        texts = " or ".join(scheme_text(weight, "output channel") for weight in schemes.weights)
        yield f"weights of {', '.join(schemes.linears)}: {texts}"
        yield f"{written.bits_per_weight:.3f} bits per weight of these linears in the cell, scales included"
    for scheme in _inputs(request):
        yield f"their inputs: {scheme_text(scheme, 'token')}"
    yield f"not rounded: embedding, lm_head, norms{f', the linears {kept}' if kept else ''}"
    yield f"tensors of this folder: {written.bytes / 1e6:.1f} MB, dtype {request.dtype}"


def _results(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| metric | corpus | this recipe | full precision | protocol |", "| :-- | :-- | --: | --: | :-- |"]
    for row in rows:
        error = f" ± {row['stderr']:.3g}" if row.get("stderr") is not None else ""
        full = row.get("full_precision")
        lines.append(
            f"| {row['metric']} | {row.get('corpus') or ''} | {row['value']:.5g}{error} | "
            f"{'' if full is None else f'{full:.5g}'} | {row.get('protocol') or ''} |"
        )
    about = "Measured by quantgrid before the export; errors are standard errors."
    return f"## Results of the cell\n\n{about}\n\n" + "\n".join(lines)


def _check(request: Request, checked: Checked | None) -> str:
    if checked is None:
        return "This export was not checked."
    error = "" if checked.perplexity_error is None else f" ± {checked.perplexity_error:.3g}"
    rows = [
        f"loaded by {checked.loader}, computed in {checked.dtype}",
        f"largest difference of a logit from the cell: {checked.max_logit_difference:.3g} ({checked.tokens} tokens)",
        f"KL divergence from the cell: {checked.kl:.3g} nats per token (accepted: {checked.kl_accepted:.3g})",
        *checked.lines(),
        f"perplexity of this folder: {checked.perplexity:.5g}{error}; of the cell: {checked.cell_perplexity:.5g} "
        f"({checked.windows} windows of {checked.window} tokens)",
    ]
    return f"Verdict: {request.verdict.text()}\n\n{_bullets(rows)}"


def _losses(request: Request) -> str:
    verdict, rows = request.verdict, []
    rows += [f"lost: {loss}" for loss in verdict.losses]
    rows += [f"rounded again: {bound}" for bound in verdict.bounds]
    rows += [f"**{loader}** is not served by this folder: it {reason}" for loader, reason in verdict.excluded.items()]
    rows += verdict.notes
    return f"## Against the measured cell\n\n{_bullets(rows)}" if rows else ""


def _snippet(snippet: Snippet) -> str:
    state = "run by the check of this export" if snippet.was_run else "not run here"
    return f"{snippet.title} ({state}):\n\n```{snippet.language}\n{snippet.code.rstrip()}\n```"


def _bullets(rows: Iterable[str]) -> str:
    return "\n".join(f"- {row}" for row in rows)
