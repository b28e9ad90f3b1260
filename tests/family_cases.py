"""Tiny models of every family with what the gates need, and every transform offline and online."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from family_models import build, some_tokens
from learned_cases import recipe, schemes, shaken
from quantgrid.calibration.collect import collect
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.config import registry
from quantgrid.evaluation.gates import Agreement, own_logits, streamed_logits, transformed_logits
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import write_tensors
from quantgrid.inference.transform import Primitive, Transform, fit
from quantgrid.models.families import FAMILIES

# families whose tests run in `make test`: plain, tied without positions in places, scaled, joined, gains
# stored as 1 + w with four norms, norms behind the linears only, both; LayerNorm with a table of positions,
# stored by head without a gate, one norm for both branches
QUICK = (
    "LlamaForCausalLM",
    "SmolLM3ForCausalLM",
    "GraniteForCausalLM",
    "Phi3ForCausalLM",
    "Gemma3ForCausalLM",
    "Olmo2ForCausalLM",
    "Glm4ForCausalLM",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "PhiForCausalLM",
)
DENSE = tuple(name for name, family in FAMILIES.items() if family.experts is None)
# in the message of a refusal
SUBSTITUTE = "rotate online instead|divide online"
# options of transforms whose defaults are for wider models, or leave out what can be shown
OPTIONS: dict[str, dict] = {
    "scaling": {"sites": ["attention_input", "output_input", "mlp_input", "down_input"]},
    "shifting": {"sites": ["attention_input", "output_input", "mlp_input", "down_input"]},
    "block_hadamard": {"block_size": 16},
    "duquant": {"block_size": 16, "steps": 8},
    "perq": {"block_size": 16},
    "wush": {"block_size": 16},
    "random_orthogonal": {"heads": "orthogonal"},
}


@dataclass
class FamilyModel:
    """A tiny model of a family in ``folder``, and 32 tokens x 4 windows to calibrate on."""

    folder: Path

    @classmethod
    def make(cls, architecture: str, folder: Path, **settings: Any) -> FamilyModel:
        return cls(build(architecture, folder, **settings))

    @cached_property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    @cached_property
    def tokens(self) -> Tensor:
        return some_tokens()

    @cached_property
    def windows(self) -> Tensor:
        return some_tokens(4, 32, seed=5)

    @cached_property
    def statistics(self) -> Path:
        """File of calibration statistics of the unmodified model."""
        path = self.folder / "statistics"
        found = collect(streamed(FullPrecision(self.folder)), self.windows, samples=16)
        write_tensors(path, dict(entry for site in found.items() for entry in to_tensors(*site).items()), {})
        return path

    @cached_property
    def logits(self) -> Tensor:
        return streamed_logits(self.folder, self.tokens)

    @cached_property
    def model_gate(self) -> Agreement:
        return Agreement.of(self.logits, own_logits(self.folder, self.tokens), self.tokens)

    def fitted(self, name: str, online: bool = False) -> Transform:
        """Transform ``name``; a learned one as training could leave it."""
        made = fit(primitives(name, online), self.decoder, str(self.statistics))
        return shaken(made) if registry.TRANSFORMS[name].learned else made

    def transform_gate(self, name: str, online: bool = False) -> Agreement:
        found = transformed_logits(self.decoder, self.fitted(name, online), self.tokens)
        return Agreement.of(found, self.logits, self.tokens)


def primitives(name: str, online: bool = False) -> list[Primitive]:
    """Primitives of a transform at its default options; those that can then run ``online``."""
    module, options = recipe(name, schemes("int4"), 1, **OPTIONS.get(name, {}))
    made = [copy(primitive) for primitive in module.primitives(**options)]
    for primitive in made:
        if online and can_be_online(primitive):
            primitive.online = True
    return made


def can_be_online(primitive: Primitive) -> bool:
    return "online" in {part.name for part in fields(primitive)}


@dataclass(frozen=True)
class Verdict:
    """Outcome of a transform on a family: ``exact`` or ``exact online``."""

    kind: str
    gate: Agreement


def verdict(model: FamilyModel, name: str) -> Verdict:
    """Outcome of transform ``name`` offline, or, where that is refused, online."""
    try:
        return Verdict("exact", model.transform_gate(name))
    except ConfigError as refusal:
        if not re.search(SUBSTITUTE, str(refusal)):
            raise
    return Verdict("exact online", model.transform_gate(name, online=True))
