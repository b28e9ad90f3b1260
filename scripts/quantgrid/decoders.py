"""A decoder as data: the weights of one layer by role, read from safetensors, and what a transform does to them on the way.

:class:`DecoderFolder` reads a canonical model folder one layer at a time. :class:`DecoderLayer` is what the primitives of
``transforms`` fold into: weights in float64, the statistics of the layer's sites, and the operations that remain online.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architecture import END_ROLES, LINEARS, SITES, ModelShape, layer_tensors, shape_from_config
from .errors import ConfigError, NumericalFailure
from .statistics import Rows, SiteStatistics
from .storage import open_tensors, read_json, tensor_names

EMBEDDING_PARTS = ("embedding", "lm_head")


@dataclass
class DecoderLayer:
    """One decoder layer while it is transformed: ``weights`` role -> float64 tensor, ``statistics`` and ``online`` per site.

    ``clips`` holds, by linear, what limits the range of its weight before it is rounded; the folded weight itself is not clipped.
    ``input_clips`` holds, by site, the limits of its input's ranges (``clip_low``, ``clip_high``, see ``linear.Rounding``).
    """

    index: int
    shape: ModelShape
    weights: dict[str, Tensor]
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    online: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {site: [] for site in SITES})
    clips: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    input_clips: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def require_foldable(self, site: str) -> None:
        """Raise :class:`ConfigError` where an online operation that mixes channels stands between ``site`` and the weights before it."""
        for operation in self.online[site]:
            if operation["operation"] != "subtract":
                raise ConfigError(f"what is folded in before '{site}' cannot follow the online '{operation['operation']}' there; "
                                  "list it first (scale first, rotate online afterwards), or leave out this site")

    def map_input(self, site: str, T: Tensor | Rows, follow: Callable[[SiteStatistics], SiteStatistics] | None = None) -> None:
        """What is before ``site`` now gives x T (a vector ``T``: a diagonal): its online shifts follow, and its statistics by ``follow``,
        by default as :meth:`SiteStatistics.transformed` has it.

        Raises :class:`ConfigError` where other online operations are there, as :meth:`require_foldable` does.
        """
        self.require_foldable(site)
        rows: Rows = T if not isinstance(T, Tensor) else (lambda x: x * T) if T.dim() == 1 else (lambda x: x @ T.to(x))
        self.online[site] = [{**operation, "shift": rows(operation["shift"])} for operation in self.online[site]]
        self._follow(site, follow or (lambda statistics: statistics.transformed(T)))

    def shift_input(self, site: str, z: Tensor) -> None:
        """What is before ``site`` now gives x - z; online shifts stay what they are."""
        self.require_foldable(site)
        self._follow(site, lambda statistics: statistics.shifted(z))

    def add_online(self, site: str, operation: dict[str, Any], follow: Callable[[SiteStatistics], SiteStatistics]) -> None:
        """One more online operation at ``site``; ``follow`` gives the statistics after it."""
        self.online[site].append(operation)
        self._follow(site, follow)

    def _follow(self, site: str, follow: Callable[[SiteStatistics], SiteStatistics]) -> None:
        if site in self.statistics:
            self.statistics[site] = follow(self.statistics[site])


class DecoderFolder:
    """A canonical model folder, read layer by layer."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.shape = shape_from_config(self.config, str(self.folder / "config.json"))
        self.files = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file that holds it."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        single = self.folder / "model.safetensors"
        return dict.fromkeys(tensor_names(single), single)

    def stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that the folder holds, as it holds them: mapped, so that they take memory from when they are looked at."""
        held = [name for name in names if name in self.files]
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files[name] for name in held):
            with open_tensors(path) as file:
                found |= {name: file.get_tensor(name) for name in held if self.files[name] == path}
        return found

    def read(self, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by role for those of ``names`` (role -> tensor name) that the folder holds; NaN or infinity is a failure of the cell."""
        stored = self.stored(names.values())
        found = {role: stored.pop(name) for role, name in names.items() if name in stored}
        for role, tensor in found.items():
            require_finite(names[role], tensor)
            found[role] = tensor.to(dtype)
        return found

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer ``index`` in float64; a linear that is missing is a :class:`ConfigError` with its name."""
        names = layer_tensors(self.shape.architecture, index)
        weights = self.read(names, torch.float64)
        for role in (*LINEARS, "attention_norm", "mlp_norm"):
            if role not in weights:
                raise ConfigError(f"{self.folder}: tensor {names[role]} is missing; the folder does not hold a whole {self.shape.architecture}")
        return DecoderLayer(index, self.shape, weights)

    def ends(self) -> dict[str, Tensor]:
        """Embedding, final norm and, where it is not tied to the embedding, lm_head, in float64."""
        return self.read(END_ROLES, torch.float64)

    def head(self, dtype: torch.dtype) -> Tensor:
        """The lm_head (vocabulary, d), which may be the embedding."""
        stored = self.stored([END_ROLES["embedding"], END_ROLES["lm_head"]])
        return stored.get(END_ROLES["lm_head"], stored[END_ROLES["embedding"]]).to(dtype)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise :class:`NumericalFailure` where a tensor of the model holds a NaN or an infinity."""
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # NaN is both extremes; no mask of all elements
        raise NumericalFailure(f"tensor {name} of the model holds NaN or infinity")
