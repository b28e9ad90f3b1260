"""Record of a training: losses per step, outcome of each part, and a state file for resuming.

The state is one safetensors file: parameters and optimizer moments as tensors, everything else as
JSON in its header, with the digest of both. No pickle. A state of another device or dtype is not used,
and the training starts over: its path has the digest of the specification, where ``device: auto`` is
whatever a machine has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import ConfigError
from ..ground.storage import read_metadata, read_tensors, write_tensors
from ..ground.tensor_files import digest_of
from ..inference.linear import compute_dtype, placement
from ..inference.transform import Parameters
from .loss_columns import HEADER
from .training_context import TrainingContext


def _as_kept(tensor: Tensor) -> Tensor | int:
    """Normalize an optimizer state entry: geoopt counts steps as int, torch in float32 tensors."""
    return int(tensor) if tensor.dtype == torch.int64 else tensor


class Session:
    """Progress of a training; a part is ``all`` or a layer.

    ``rows``: [part, step, loss, learning rate] of every step. ``ends``: part -> start and end loss.
    ``finished``: parameters of finished parts. ``place``: device and dtypes, which a state has to share.
    """

    def __init__(self, path: Path | None = None, save_seconds: float = 30.0, place: Mapping[str, str] | None = None):
        self.path, self.save_seconds, self._saved = path, save_seconds, time.monotonic()
        self.place = dict(place or {})
        self.rows: list[list[Any]] = []
        self.ends: dict[str, dict[str, Any]] = {}
        self.finished: Parameters = {}
        self._interrupted: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        if path and path.is_file():
            self._load(path)

    @classmethod
    def of(cls, context: TrainingContext, rarer: float = 1.0) -> Session:
        """Session of a training with ``context``, whose state is saved ``rarer`` times less often."""
        place = placement({"device": context.device, "solver_dtype": context.solver_dtype})
        dtype = str(compute_dtype("auto", place.device)).removeprefix("torch.")
        return cls(context.state_file, rarer * context.save_seconds, {**place.to_dict(), "dtype": dtype})

    def _load(self, path: Path) -> None:
        about, tensors = read_metadata(path), read_tensors(path)
        if about.pop("digest", None) != digest_of(about, tensors):
            raise ConfigError(
                f"{path}: training state is altered or incomplete; delete it and run again: the training starts over"
            )
        if about.get("place") != self.place:
            print(f"{path} is not used, the training starts over: it is of another device or dtype", file=sys.stderr)
            return
        self.rows, self.ends, self._interrupted = about["rows"], about["ends"], about["current"]
        self.finished = {
            name.removeprefix("finished."): tensor for name, tensor in tensors.items() if name.startswith("finished.")
        }
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("finished.")}

    def resume(self, part: str, trainables: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
        """(steps done, start loss) of ``part``; (0, None) unless it was interrupted.

        Restores parameters and moments.
        """
        if self._interrupted.get("part") != part:
            self.rows = [row for row in self.rows if row[0] != part]  # of a part that starts over
            return 0, None
        with torch.no_grad():
            for number, parameter in enumerate(trainables.parameters()):
                parameter.copy_(self._tensors[f"free.{number}"])
        state = optimizer.state_dict()
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        state["state"] = {
            number: {
                name.removeprefix(f"moment.{number}."): _as_kept(tensor)
                for name, tensor in self._tensors.items()
                if name.startswith(f"moment.{number}.")
            }
            for number in numbers
        }
        optimizer.load_state_dict(state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # torch's Adam turns integers into float32 tensors
        for number, parameter in zip(numbers, parameters):
            optimizer.state[parameter] |= {
                name: value for name, value in state["state"][number].items() if isinstance(value, int)
            }
        done, self._interrupted = self._interrupted, {}
        return done["step"], done["start"]

    def step(
        self, part: str, row: list[Any], start: float, trainables: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record a finished step and periodically save the state."""
        self.rows.append([part, *row])
        if self.path and time.monotonic() - self._saved >= self.save_seconds:
            free = {
                f"free.{number}": parameter.detach().cpu() for number, parameter in enumerate(trainables.parameters())
            }
            moments = {
                f"moment.{number}.{name}": torch.as_tensor(value).cpu()
                for number, entry in optimizer.state_dict()["state"].items()
                for name, value in entry.items()
            }
            self._write({"part": part, "step": row[0], "start": start}, {**free, **moments})

    def finish(self, part: str, parameters: Parameters, start: float, end: float, trained: bool) -> None:
        """Record a finished part and its parameters; without any step it is ``untrained``."""
        self.ends[part] = {
            "start": start,
            "end": end,
            "kept": ("learned" if end < start else "start") if trained else "untrained",
        }
        self.finished |= parameters
        if self.path and time.monotonic() - self._saved >= self.save_seconds:
            self._write({}, {})

    def _write(self, current: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        finished = {f"finished.{name}": tensor for name, tensor in self.finished.items()}
        kept, about = (
            {**finished, **tensors},
            {"place": self.place, "rows": self.rows, "ends": self.ends, "current": current},
        )
        write_tensors(self.path, kept, {**about, "digest": digest_of(about, kept)})
        self._saved = time.monotonic()

    def table(self) -> str:
        """Losses as CSV."""
        return HEADER + "".join(",".join(map(str, row)) + "\n" for row in self.rows)
