"""A transform as a list of primitives with their parameters: fitted layer by layer, folded layer by layer, kept as safetensors.

A recipe (``none``, ``scaling``, ...) is a module with ``primitives(seed, **options)``. Each primitive sees a layer as the ones
before it left it, so that composing is listing: rotation then scaling fits the scaling on rotated weights and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..architecture import END_ROLES, SITES, ModelShape
from ..calibration import site_name
from ..decoders import DecoderFolder, DecoderLayer, require_finite
from ..errors import NumericalFailure
from ..statistics import Rows, from_file
from ..storage import open_tensors, read_metadata, read_tensors, write_tensors

Parameters = dict[str, Tensor]
InputMap = tuple[Rows, Rows]  # a map of the rows of a site's input, and its inverse
ROWS = 1 << 13  # of embedding and lm_head folded at a time; a whole number of the blocks in which a rotation goes over them


class Primitive(Protocol):
    """One elementary function-preserving change. ``reads_layer``: whether fitting needs the layer's weights and statistics."""

    reads_layer: bool

    def fit_model(self, shape: ModelShape) -> Parameters:
        """Parameters shared by all layers (float64)."""

    def fit_layer(self, layer: DecoderLayer) -> Parameters:
        """Parameters of one layer (float64)."""

    def fold_layer(self, layer: DecoderLayer, parameters: Parameters) -> None:
        """Change the layer's weights, statistics and online operations; ``parameters`` holds the shared ones too."""

    def fold_ends(self, ends: Parameters, parameters: Parameters) -> None:
        """Change embedding, final norm and lm_head."""


@runtime_checkable
class ReadsAllLayers(Protocol):
    """A primitive with shared parameters that all layers decide together."""

    def fit_layers(self, layers: Iterable[DecoderLayer]) -> Parameters:
        """Parameters shared by all layers (float64), from the layers as the primitives before this one leave them."""


@dataclass
class Transform:
    """Primitives in order of application; ``parameters`` named ``{primitive}.model.{name}`` or ``{primitive}.{layer}.{name}``."""

    primitives: list[Primitive] = field(default_factory=list)
    parameters: Parameters = field(default_factory=dict)

    def part(self, *prefixes: str) -> Parameters:
        return {name.removeprefix(prefix): tensor for prefix in prefixes for name, tensor in self.parameters.items() if name.startswith(prefix)}

    def add(self, prefix: str, parameters: Parameters) -> None:
        """Keep what was fitted: ``prefix`` is ``{primitive}.model`` or ``{primitive}.{layer}``."""
        laid_out = {f"{prefix}.{name}": value.contiguous() for name, value in parameters.items()}  # as a file gives them: products take other paths
        self.parameters |= laid_out

    def fold_one(self, layer: DecoderLayer, number: int) -> None:
        """Fold the primitive ``number`` alone."""
        self.primitives[number].fold_layer(layer, self.part(f"{number}.model.", f"{number}.{layer.index}."))

    def fold_layer(self, layer: DecoderLayer) -> None:
        for number in range(len(self.primitives)):
            self.fold_one(layer, number)

    def fold_ends(self, ends: Parameters) -> None:
        for number, primitive in enumerate(self.primitives):
            primitive.fold_ends(ends, self.part(f"{number}.model."))

    def save(self, path: str | Path, metadata: Mapping | None = None) -> None:
        names = [{"module": type(p).__module__.rpartition(".")[2], "class": type(p).__name__, "options": asdict(p)} for p in self.primitives]
        write_tensors(path, self.parameters, {**(metadata or {}), "primitives": names})

    @classmethod
    def load(cls, path: str | Path) -> Transform:
        """The transform kept at ``path``; one whose fit broke down raises its :class:`NumericalFailure` again."""
        about = read_metadata(path)
        if about.get("status") == "failed":
            raise NumericalFailure(about["reason"])
        listed = about["primitives"]
        made = [getattr(import_module(f"{__package__}.{item['module']}"), item["class"])(**item["options"]) for item in listed]
        return cls(made, read_tensors(path))


def layer_state(decoder: DecoderFolder, index: int, statistics: str | Path | None) -> DecoderLayer:
    """A decoder layer with its weights and, where a statistics file is given, the statistics of its sites."""
    layer = decoder.layer(index)
    if statistics is not None:
        with open_tensors(statistics) as file:
            layer.statistics = {site: from_file(file, site_name(index, site)) for site in SITES}
        for site, found in layer.statistics.items():
            found.require_finite(site_name(index, site))
    return layer


def fit(primitives: list[Primitive], decoder: DecoderFolder, statistics: str | Path | None,
        progress: Callable[[Iterable], Iterable] = iter) -> Transform:
    """Fit every primitive on every layer, each on what the primitives before it made of the layer."""
    transform, begun = Transform(primitives), 0
    for number, primitive in enumerate(primitives):
        transform.add(f"{number}.model", primitive.fit_model(decoder.shape))
        if isinstance(primitive, ReadsAllLayers):
            _fit_part(transform, range(begun, number), decoder, statistics, progress)
            layers = (_folded(transform, number, decoder, index, statistics) for index in progress(range(decoder.shape.layers)))
            transform.add(f"{number}.model", primitive.fit_layers(layers))
            begun = number
    _fit_part(transform, range(begun, len(primitives)), decoder, statistics, progress)
    return transform


def _fit_part(transform: Transform, part: range, decoder: DecoderFolder, statistics: str | Path | None,
              progress: Callable[[Iterable], Iterable]) -> None:
    """Fit the primitives ``part`` of ``transform`` layer by layer; those before them are fitted already."""
    if not part:
        return
    reads = any(primitive.reads_layer for primitive in transform.primitives[part.start:part.stop])
    for index in progress(range(decoder.shape.layers)):
        layer = _folded(transform, part.start, decoder, index, statistics) if reads else DecoderLayer(index, decoder.shape, {})
        for number in part:
            transform.add(f"{number}.{index}", transform.primitives[number].fit_layer(layer))
            if reads:
                transform.fold_one(layer, number)


def _folded(transform: Transform, count: int, decoder: DecoderFolder, index: int, statistics: str | Path | None) -> DecoderLayer:
    """Layer ``index`` after the first ``count`` primitives."""
    layer = layer_state(decoder, index, statistics)
    for number in range(count):
        transform.fold_one(layer, number)
    return layer


def folded_ends(transform: Transform, decoder: DecoderFolder, dtype: torch.dtype) -> Parameters:
    """Embedding and, where it is not tied to it, lm_head in ``dtype``, the final norm in float64, as ``transform`` leaves them.

    Folding is float64 and takes every row (token of the vocabulary) by itself, so ``ROWS`` of them are folded at a time.
    """
    stored = decoder.stored(END_ROLES.values())
    ends = {role: stored[name] for role, name in END_ROLES.items() if name in stored}
    for role, tensor in ends.items():
        require_finite(END_ROLES[role], tensor)
    found: Parameters = {}
    for start in range(0, decoder.shape.vocabulary, ROWS):
        rows = slice(start, start + ROWS)
        folded = {role: (tensor if role == "final_norm" else tensor[rows]).double() for role, tensor in ends.items()}
        transform.fold_ends(folded)
        found["final_norm"] = folded.pop("final_norm")
        for role, tensor in folded.items():
            found.setdefault(role, torch.empty(decoder.shape.vocabulary, tensor.shape[-1], dtype=dtype))[rows] = tensor
    return found


def derived_seed(seed: int, *stream: object) -> int:
    """A seed of its own for every named stream, so that no draw depends on the order of the others."""
    return int.from_bytes(sha256("/".join(map(str, (seed, *stream))).encode()).digest()[:7])
