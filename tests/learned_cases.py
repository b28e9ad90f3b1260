"""Small decoders on disk with token windows and statistics, and the learned transforms with what they need, for their tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quantgrid import corpora, registry
from quantgrid.cell_schemes import CellSchemes
from quantgrid.decoders import DecoderFolder
from quantgrid.granularities import cell_schemes
from quantgrid.hadamard import random_orthogonal
from quantgrid.learning.session import Session
from quantgrid.learning.trainables import learned_kinds
from quantgrid.transforms.composition import Transform, derived_seed, fit
from quantgrid.workplace import Workplace
from reference_decoder import logits, site_inputs
from reference_statistics import write_statistics
from tiny_decoders import CASES, Case, random_tokens, save

LEARNED = [name for name, method in registry.TRANSFORMS.items() if method.learned]
HELD_OUT = registry.WINDOWS["held_out"].default
VARIED = [next(case for case in CASES if case.architecture.startswith(name) and want(case)) for name, want in
          (("Llama", lambda c: c.heads == 9 and c.tied), ("Llama", lambda c: c.bias), ("Qwen2", lambda c: not c.tied), ("Qwen3", lambda c: c.bias),
           ("Mistral", lambda c: c.head_dim == 32))]


def schemes(preset: str = "int4", granularity: str = "channel", head_dim: int = 16) -> CellSchemes:
    return CellSchemes.from_dict(cell_schemes({"preset": preset}, granularity, "test", head_dim))


@dataclass(frozen=True)
class Given:
    """A decoder in a folder, its config and state in float64, token windows, and the logits of two of them."""

    folder: Path
    config: dict
    state: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor

    @classmethod
    def make(cls, folder: Path, case: Case, windows: int = 24 + HELD_OUT) -> Given:
        config, state = case.build()
        save(folder, config, state, torch.float64)
        tokens = random_tokens(config, windows, 16)
        corpora.save(folder / "windows.safetensors", tokens, {})
        write_statistics(folder / "statistics", site_inputs(state, config, tokens))
        return cls(folder, config, state, tokens, logits(state, config, tokens[:2]))

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    def place(self, **more: Any) -> Workplace:
        return Workplace(self.folder, self.folder / "windows.safetensors", **more)


def recipe(name: str, wanted: CellSchemes | None = None, seed: int = 0, **options: Any) -> tuple[ModuleType, dict[str, Any]]:
    """The module of a learned transform and all that it is told."""
    method = registry.method("transforms", name)
    given = method.resolve({"method": name, **options}, name)["options"] | {"seed": seed}
    return registry.load("transforms", name), given | ({"schemes": wanted or schemes()} if method.fitted_to_scheme else {})


def start(made: Given, name: str, wanted: CellSchemes | None = None, **options: Any) -> Transform:
    module, given = recipe(name, wanted, **options)
    return fit(module.primitives(**given), made.decoder, made.folder / "statistics")


def shaken(transform: Transform) -> Transform:
    """The same transform as training could leave it: random rotations, scales within a factor of two, clip ratios of a half or more."""
    parameters = dict(transform.parameters)
    for name, kind in learned_kinds(transform).items():
        generator, shape = torch.Generator().manual_seed(derived_seed(1, name)), parameters[name].shape
        if kind in ("rotation", "cayley"):
            found = [random_orthogonal(shape[-1], derived_seed(1, name, item)) for item in range(parameters[name].numel() // shape[-1] ** 2)]
            parameters[name] = torch.stack(found).view(shape)
        else:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            parameters[name] = 2 ** (2 * drawn - 1) if kind == "positive" else 0.5 + 0.5 * drawn
    return Transform(transform.primitives, parameters)


class Interrupted(Exception):
    pass


@contextmanager
def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs inside has to be a training; it is interrupted right after its ``step``-th step."""
    count, original = [0], Session.step

    def counted(self, *arguments):
        original(self, *arguments)
        count[0] += 1
        if count[0] == step:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Session, "step", counted)
        with pytest.raises(Interrupted):
            yield
