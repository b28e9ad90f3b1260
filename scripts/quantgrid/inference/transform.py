"""A transform: a list of primitives with parameters, fitted and folded layer by layer.

A recipe (``none``, ``scaling``, ...) is a module with ``primitives(seed, **options)``. Each
primitive reads the layer as transformed by its predecessors, so composition is concatenation:
rotation then scaling fits the scaling on rotated weights and statistics. Transforms are stored as
safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..calibration.accumulators import site_name
from ..calibration.layers import DecoderFolder, DecoderLayer, LaterStatistics, require_finite
from ..calibration.statistics import SiteStatistics, from_file
from ..ground.storage import open_tensors, write_tensors
from ..machine.chunks import ROWS
from ..models.plans import END_ROLES, PER_TOKEN
from ..models.shapes import ModelShape

Parameters = dict[str, Tensor]

# primitives of all imported modules, by class name
PRIMITIVES: dict[str, type[Primitive]] = {}


class Primitive:
    """One elementary function-preserving change, a dataclass of its options.

    A primitive overrides what it fits and changes; by default it has no parameters and leaves
    embedding, final norm and lm_head unchanged. ``reads_layer``: whether fitting reads the weights
    and statistics of the layer.
    """

    reads_layer = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        known = PRIMITIVES.setdefault(cls.__name__, cls)  # a module executed twice adds one
        if known.__module__ != cls.__module__:
            raise TypeError(f"two primitives are called {cls.__name__}: {known.__module__}, {cls.__module__}")

    def fit_model(self, shape: ModelShape) -> Parameters:
        """Fit parameters shared by all layers (float64)."""
        return {}

    def fit_layer(self, layer: DecoderLayer) -> Parameters:
        """Fit parameters of one layer (float64)."""
        return {}

    def fold_layer(self, layer: DecoderLayer, parameters: Parameters) -> None:
        """Change weights, statistics and online operations of the layer.

        ``parameters`` includes the shared ones.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define fold_layer")

    def fold_ends(self, ends: Parameters, parameters: Parameters) -> None:
        """Change the tensors outside of the layers, by the roles of ``END_ROLES``."""


@runtime_checkable
class ReadsAllLayers(Protocol):
    """Primitive with shared parameters fitted on all layers together."""

    def fit_layers(self, layers: Iterable[DecoderLayer]) -> Parameters:
        """Fit shared parameters (float64) on layers as transformed by the preceding primitives."""


@dataclass
class Transform:
    """Primitives in order of application, with their parameters.

    ``parameters`` are named ``{primitive}.model.{name}`` or ``{primitive}.{layer}.{name}``.
    """

    primitives: list[Primitive] = field(default_factory=list)
    parameters: Parameters = field(default_factory=dict)

    def part(self, *prefixes: str, device: torch.device | None = None) -> Parameters:
        """Parameters whose names begin with one of ``prefixes``, without it; moved to ``device`` if given."""
        return {
            name.removeprefix(prefix): tensor if device is None else tensor.to(device)
            for prefix in prefixes
            for name, tensor in self.parameters.items()
            if name.startswith(prefix)
        }

    def add(self, prefix: str, parameters: Parameters) -> None:
        """Add fitted parameters under ``prefix``, ``{primitive}.model`` or
        ``{primitive}.{layer}``; they stay on the CPU."""
        laid_out = {
            f"{prefix}.{name}": value.cpu().contiguous() for name, value in parameters.items()
        }  # in the memory layout of a file: matrix products depend on it
        self.parameters |= laid_out

    def fold_one(self, layer: DecoderLayer, number: int) -> None:
        """Fold primitive ``number`` only, on the device of the layer."""
        parameters = self.part(f"{number}.model.", f"{number}.{layer.index}.", device=layer.device)
        self.primitives[number].fold_layer(layer, parameters)

    def fold_layer(self, layer: DecoderLayer) -> None:
        for number in range(len(self.primitives)):
            self.fold_one(layer, number)

    def fold_ends(self, ends: Parameters) -> None:
        for number, primitive in enumerate(self.primitives):
            primitive.fold_ends(ends, self.part(f"{number}.model.", device=ends["final_norm"].device))

    def save(self, path: str | Path, metadata: Mapping | None = None) -> None:
        names = [{"class": type(primitive).__name__, "options": asdict(primitive)} for primitive in self.primitives]
        write_tensors(path, self.parameters, {**(metadata or {}), "primitives": names})


def layer_state(decoder: DecoderFolder, index: int, statistics: str | Path | None) -> DecoderLayer:
    """Decoder layer with its weights and, given a statistics file, the statistics of its sites."""
    layer = decoder.layer(index)
    if statistics is not None:
        layer.statistics = site_statistics(layer, statistics, decoder.placement.solver_dtype)
    return layer


def site_statistics(
    layer: DecoderLayer, path: str | Path, solver_dtype: torch.dtype = torch.float64
) -> dict[str, SiteStatistics]:
    """Statistics of the sites of ``layer`` in the file ``path``, on its device; those of experts are read
    later."""

    def read(site: str) -> SiteStatistics:
        with open_tensors(path) as file:
            found = from_file(file, site_name(layer.index, site))
        found.require_finite(site_name(layer.index, site))
        return replace(found, solver_dtype=solver_dtype).to(layer.device)

    later = layer.plan.expert_sites
    held = {site: read(site) for site in layer.plan.sites if site not in later}
    return LaterStatistics(held, later, read) if later else held


def fit(
    primitives: list[Primitive],
    decoder: DecoderFolder,
    statistics: str | Path | None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Transform:
    """Fit every primitive on every layer, each on the output of its predecessors."""
    transform, begun = Transform(primitives), 0
    for number, primitive in enumerate(primitives):
        transform.add(f"{number}.model", primitive.fit_model(decoder.shape))
        if isinstance(primitive, ReadsAllLayers):
            _fit_part(transform, range(begun, number), decoder, statistics, progress)
            layers = (
                _folded(transform, number, decoder, index, statistics)
                for index in progress(range(decoder.shape.layers))
            )
            transform.add(f"{number}.model", primitive.fit_layers(layers))
            begun = number
    _fit_part(transform, range(begun, len(primitives)), decoder, statistics, progress)
    return transform


def _fit_part(
    transform: Transform,
    part: range,
    decoder: DecoderFolder,
    statistics: str | Path | None,
    progress: Callable[[Iterable], Iterable],
) -> None:
    """Fit the primitives ``part`` of ``transform`` layer by layer; their predecessors are
    fitted."""
    if not part:
        return
    reads = any(primitive.reads_layer for primitive in transform.primitives[part.start : part.stop])
    for index in progress(range(decoder.shape.layers)):
        layer = (
            _folded(transform, part.start, decoder, index, statistics)
            if reads
            else DecoderLayer(index, decoder.shape, {})
        )
        for number in part:
            transform.add(f"{number}.{index}", transform.primitives[number].fit_layer(layer))
            if reads:
                transform.fold_one(layer, number)


def _folded(
    transform: Transform, count: int, decoder: DecoderFolder, index: int, statistics: str | Path | None
) -> DecoderLayer:
    """Layer ``index`` after the first ``count`` primitives."""
    layer = layer_state(decoder, index, statistics)
    for number in range(count):
        transform.fold_one(layer, number)
    return layer


def folded_ends(transform: Transform, decoder: DecoderFolder, dtype: torch.dtype) -> Parameters:
    """Transformed tensors outside of the layers, on the CPU: embedding and untied lm_head in ``dtype``, others in
    float64.

    Folding is float64 and treats every row (token of the vocabulary) separately, so it processes
    ``ROWS`` rows at a time, on the device of the decoder's layers.
    """
    stored = decoder.stored(END_ROLES.values())
    ends = {role: stored[name] for role, name in END_ROLES.items() if name in stored}
    for role, tensor in ends.items():
        require_finite(END_ROLES[role], tensor)
    found: Parameters = {}
    for start in range(0, decoder.shape.vocabulary, ROWS):
        rows = slice(start, start + ROWS)
        folded = {
            role: (tensor[rows] if role in PER_TOKEN else tensor).to(decoder.placement.device).double()
            for role, tensor in ends.items()
        }
        transform.fold_ends(folded)
        for role, tensor in folded.items():
            if role in PER_TOKEN:
                size, kept = (decoder.shape.vocabulary, *tensor.shape[1:]), dtype if tensor.dim() > 1 else tensor.dtype
                whole = found.setdefault(role, torch.empty(size, dtype=kept))
                whole[rows] = tensor.to(kept).cpu()
            else:
                found[role] = tensor.cpu()
    return found


def derived_seed(seed: int, *stream: object) -> int:
    """Seed derived from ``seed`` for a named stream, so that no draw depends on the order of
    others."""
    return int.from_bytes(sha256("/".join(map(str, (seed, *stream))).encode()).digest()[:7])
