"""Decoder layers as data: weights by role, read from safetensors, and the state of a transform.

:class:`DecoderFolder` reads a canonical model folder one layer at a time. The primitives of
``transforms`` modify a :class:`DecoderLayer`: weights in float64, statistics of the layer's sites,
and the operations that remain online.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ground.errors import ConfigError, NumericalFailure
from ..ground.storage import open_tensors, read_json, tensor_names
from ..machine.devices import Placement
from ..models.architectures import architecture_of
from ..models.families import FAMILIES
from ..models.lm_head import Head
from ..models.multimodal import PREFIX, STACKED, prefix_of, stored_name
from ..models.plans import END_ROLES, LAYER_PREFIX, LayerPlan, Stored, is_in_mixture
from ..models.shapes import ModelShape, layer_tensors, shape_from_config
from .statistics import Rows, SiteStatistics

_LAYER = re.compile(LAYER_PREFIX.replace(".", r"\.").format(layer=r"(\d+)"))
PIECE = 16  # tensors of a layer with experts that are mapped into memory at a time


@dataclass
class DecoderLayer:
    """Decoder layer during a transform: weights by role (float64), statistics and online operations
    by site.

    ``clips`` maps a linear to the clipping of its weight before rounding; the folded weight itself
    is not clipped. ``input_clips`` maps a site to the limits of its input ranges (``clip_low``,
    ``clip_high``, see ``linear.Rounding``). ``global_scales`` maps a linear to the global scale (1, 1)
    that its weight shares with the linears of its site.
    """

    index: int
    shape: ModelShape
    weights: dict[str, Tensor]
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    online: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    clips: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    input_clips: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    global_scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.online = {site: self.online.get(site, []) for site in self.plan.sites}

    @property
    def plan(self) -> LayerPlan:
        return self.shape.plan(self.index)

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU without any."""
        return next((tensor.device for tensor in self.weights.values()), torch.device("cpu"))

    def blocking(self, site: str) -> str:
        """Name of the online operation at ``site`` that blocks folding into its predecessors, or nothing.

        Only shifts do not mix channels.
        """
        names = (operation["operation"] for operation in self.online[site])
        return next((name for name in names if name != "subtract"), "")

    def require_foldable(self, site: str) -> None:
        """Raise :class:`ConfigError` if an online operation blocks folding (:meth:`blocking`)."""
        if blocking := self.blocking(site):
            raise ConfigError(
                f"cannot fold into the weights before '{site}': the online '{blocking}' comes first; "
                "list this transform before it (scale first, rotate online afterwards), or leave out this site"
            )

    def map_input(
        self, site: str, T: Tensor | Rows, follow: Callable[[SiteStatistics], SiteStatistics] | None = None
    ) -> None:
        """Update ``site`` for an input x T (a vector ``T``: a diagonal), already folded into its
        predecessors.

        Online shifts are mapped too. ``follow`` maps the statistics, by default
        :meth:`SiteStatistics.transformed`. Raises :class:`ConfigError` for other online operations,
        as :meth:`require_foldable`.
        """
        self.require_foldable(site)
        rows: Rows = T if not isinstance(T, Tensor) else (lambda x: x * T) if T.dim() == 1 else (lambda x: x @ T.to(x))
        self.online[site] = [{**operation, "shift": rows(operation["shift"])} for operation in self.online[site]]
        self._follow(site, follow or (lambda statistics: statistics.transformed(T)))

    def shift_input(self, site: str, z: Tensor) -> None:
        """Update the statistics of ``site`` for an input x - z; online shifts are unchanged."""
        self.require_foldable(site)
        self._follow(site, lambda statistics: statistics.shifted(z))

    def add_online(
        self, site: str, operation: dict[str, Any], follow: Callable[[SiteStatistics], SiteStatistics]
    ) -> None:
        """Append an online operation at ``site``; ``follow`` maps the statistics."""
        self.online[site].append(operation)
        self._follow(site, follow)

    def add_bias(self, linear: str, change: Tensor) -> None:
        """Add ``change`` (m,) to the bias of ``linear``, which may have none yet."""
        before = self.weights.get(f"{linear}_bias")
        self.weights[f"{linear}_bias"] = change if before is None else before + change

    def _follow(self, site: str, follow: Callable[[SiteStatistics], SiteStatistics]) -> None:
        if isinstance(self.statistics, LaterStatistics):
            self.statistics.follow(site, follow)
        elif site in self.statistics:
            self.statistics[site] = follow(self.statistics[site])


class NarrowWeights(dict[str, Tensor]):
    """Weights by role of which those of experts (``narrow``) take half the memory.

    They are float64 when asked for and float32 in between: a layer of many experts would not fit.
    """

    def __init__(self, narrow: set[str], weights: Mapping[str, Tensor]):
        super().__init__(weights)
        self.narrow = narrow

    def __getitem__(self, role: str) -> Tensor:
        held = super().__getitem__(role)
        return held.double() if role in self.narrow else held

    def __setitem__(self, role: str, weight: Tensor) -> None:
        super().__setitem__(role, weight.float() if role in self.narrow else weight)


class LaterStatistics(dict[str, SiteStatistics]):
    """Statistics by site; those of the sites ``later`` are read with ``read`` whenever they are asked for.

    A change of their input is kept as a function until then, so that never more than one of them is in
    memory.
    """

    def __init__(self, held: Mapping[str, SiteStatistics], later: Iterable[str], read: Callable[[str], SiteStatistics]):
        super().__init__(held)
        self.read, self.changes = read, {site: [] for site in later}

    def follow(self, site: str, change: Callable[[SiteStatistics], SiteStatistics]) -> None:
        """Change the statistics of ``site``."""
        if site in self.changes:
            self.changes[site].append(change)
        else:
            self[site] = change(self[site])

    def __missing__(self, site: str) -> SiteStatistics:
        found = self.read(site)
        for change in self.changes[site]:
            found = change(found)
        return found


class DecoderFolder:
    """Canonical model folder, read layer by layer; of ``layers`` only the first.

    :meth:`layer` and :meth:`ends` place their tensors on the device of ``placement``.
    """

    def __init__(self, folder: str | Path, layers: int | None = None, placement: Placement | None = None):
        self.folder, self.placement = Path(folder), placement or Placement()
        path = self.folder / "config.json"
        self.config = first_layers(read_json(path), layers)
        self.prefix = prefix_of(self.config, str(path))
        self.shape = shape_from_config(self.config, str(path))
        self.config = {key: value for key, value in self.config.items() if key not in (PREFIX, STACKED)}
        self.files = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> its file."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        single = self.folder / "model.safetensors"
        return dict.fromkeys(tensor_names(single), single)

    def place(self, name: str) -> Stored:
        """Return the place of the canonical tensor ``name`` in the files."""
        family = self.shape.family
        found = family.ends.get(name, Stored(name))
        if (layer := _LAYER.match(name)) is not None:
            place = self.shape.plan(int(layer[1])).stored.get(name[layer.end() :], Stored(name[layer.end() :]))
            found = replace(place, name=layer[0] + place.name if place.name else "")
        return replace(found, name=stored_name(found.name, family, self.prefix, self.files)) if found.name else found

    def holds(self, name: str) -> bool:
        """Whether the model has the canonical tensor ``name``."""
        place = self.place(name)
        return not place.name or place.name in self.files

    def stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The canonical tensors ``names`` present in the folder, memory-mapped (pages load on access)."""
        every = {name: self.place(name) for name in names}
        found = {name: torch.full((1,), place.offset) for name, place in every.items() if not place.name}
        places = {name: place for name, place in every.items() if place.name in self.files}
        for path in dict.fromkeys(self.files[place.name] for place in places.values()):
            with open_tensors(path) as file:
                found |= {
                    name: self._part(_entry(file, place), place)
                    for name, place in places.items()
                    if self.files[place.name] == path
                }
        return found

    def _part(self, tensor: Tensor, place: Stored) -> Tensor:
        """Canonical tensor of the ``tensor`` that holds it."""
        tensor = tensor.mT if place.transposed else tensor
        if place.parts:
            rows = [self.shape.linear_size(part)[0] for part in place.parts]
            groups = self.shape.heads if place.by_head else rows[0] if place.by_row else 1
            parts = tensor.unflatten(0, (groups, -1)).split([size // groups for size in rows], 1)
            tensor = parts[place.parts.index(place.part)].flatten(0, 1)
        if place.offset:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + place.offset
        return tensor

    def read(self, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by role, for those of ``names`` (role -> tensor name) in the folder.

        Raises :class:`NumericalFailure` for NaN or infinity.
        """
        found: dict[str, Tensor] = {}
        for roles in pieces(names):
            stored = self.stored(names[role] for role in roles)
            for role in roles:
                if (tensor := stored.get(names[role])) is not None:
                    tensor = tensor.to(self.placement.device)
                    require_finite(names[role], tensor)
                    found[role] = tensor.to(dtype)
        return found

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer ``index`` in float64; :class:`ConfigError` names a missing linear."""
        names, plan = layer_tensors(self.shape, index), self.shape.plan(index)
        narrow = {*filter(is_in_mixture, plan.linears)}
        weights = self.read({role: name for role, name in names.items() if role not in narrow}, torch.float64)
        if narrow:
            experts = self.read({role: name for role, name in names.items() if role in narrow}, torch.float32)
            weights = NarrowWeights(narrow, {**weights, **experts})
        for role in (*plan.linears, *plan.readers, *plan.norms, *plan.post_norms):
            if role not in weights:
                raise ConfigError(
                    f"{self.folder}: tensor {names[role]} is missing; a complete {self.shape.architecture} is needed"
                )
        return DecoderLayer(index, self.shape, weights)

    def ends(self) -> dict[str, Tensor]:
        """Tensors outside of the layers in float64; a tied lm_head is absent."""
        return self.read(END_ROLES, torch.float64)

    def head(self, dtype: torch.dtype) -> Head:
        """Head of the model; its lm_head may be the embedding."""
        stored = self.stored([END_ROLES[role] for role in ("embedding", "lm_head", "lm_head_bias")])
        weight = stored.get(END_ROLES["lm_head"], stored[END_ROLES["embedding"]])
        bias = stored.get(END_ROLES["lm_head_bias"])
        return Head.of(self.shape.family, self.config, weight.to(dtype), None if bias is None else bias.to(dtype))


def _entry(file: Any, place: Stored) -> Tensor:
    """Tensor at ``place`` of an open file, or its entry there."""
    return file.get_tensor(place.name) if place.index is None else file.get_slice(place.name)[place.index]


def pieces(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield ``names``, ``PIECE`` at a time: mapped pages count as memory until the last tensor of a file is freed."""
    listed = list(names)
    for start in range(0, len(listed), PIECE):
        yield listed[start : start + PIECE]


def first_layers(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """Config of a model that ends after its first ``layers``; ``config`` itself for None."""
    if layers is None:
        return config
    key = FAMILIES[architecture_of(config)].keys.get("num_hidden_layers", "num_hidden_layers")
    if layers >= config[key]:
        return config
    return {
        **config,
        key: layers,
        **{listed: config[listed][:layers] for listed in ("layer_types", "mlp_layer_types") if config.get(listed)},
    }


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise :class:`NumericalFailure` if a tensor of the model holds NaN or infinity."""
    # NaN propagates to both extremes; this needs no mask of all elements
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise NumericalFailure(f"tensor {name} of the model holds NaN or infinity")
