"""Small decoders on disk with token windows and statistics, learned transforms and trained mitigations with
what they need, for their tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import family_models
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.config import registry, training_options
from quantgrid.corpora import token_windows
from quantgrid.evaluation.gates import streamed_logits
from quantgrid.ground.storage import read_json
from quantgrid.inference.transform import Parameters, Transform, derived_seed, fit
from quantgrid.learning.network import Network
from quantgrid.learning.session import Session
from quantgrid.learning.trainables import learned_kinds
from quantgrid.learning.training_context import TrainingContext
from quantgrid.learning.transformed import Trained
from quantgrid.linalg.hadamard import random_orthogonal
from quantgrid.models.families import FAMILIES
from quantgrid.models.lm_head import head_of
from quantgrid.quantization.cached import Recipe
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.transforms.recipes import random_hadamard
from reference_decoder import logits, site_inputs
from reference_statistics import write_statistics
from tiny_decoders import Case, random_tokens, save

LEARNED = [name for name, method in registry.TRANSFORMS.items() if method.learned]
EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
# mixtures whose tests run in `make test`
QUICK_EXPERTS = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
)
SPARSE = "Qwen2MoeForCausalLM"  # with a shared expert, and an MLP in the middle layer
HELD_OUT = training_options.WINDOWS["held_out"].default
NOTHING = CellSchemes()
OBJECTIVES = [
    ("optimized_rotation", {"objective": "end_to_end"}),
    ("optimized_rotation", {"objective": "layer_wise"}),
    ("optimized_rotation_scaling", {"objective": "end_to_end", "top": 20}),
    ("optimized_rotation_scaling", {"objective": "layer_wise"}),
    ("optimized_rotation", {"objective": "layer_wise", "round_weights": True}),
    ("optimized_scaling", {}),
    ("flatquant", {}),
    ("flatquant", {"error": "relative"}),
    ("data_free_rotation", {"goal": "minimize"}),
    ("data_free_rotation", {"goal": "maximize"}),
]
RATES = {"rotation": 5e-2, "cayley": 1e-2, "positive": 1e-2, "fraction": 1e-2}


def schemes(preset: str = "int4", granularity: str = "channel", head_dim: int = 16) -> CellSchemes:
    return CellSchemes.from_dict(cell_schemes({"preset": preset}, granularity, "test", head_dim))


@dataclass(frozen=True)
class Given:
    """A decoder in a folder, its config and state in float64, token windows, and the logits of two
    of them."""

    folder: Path
    config: dict
    state: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor

    @classmethod
    def make(cls, folder: Path, case: Case | str, windows: int = 24 + HELD_OUT) -> Given:
        """Given decoder of a case, or of an architecture with experts (``EXPERTS``), which has float32 weights."""
        if isinstance(case, str):
            return cls._of_family(folder, case, windows)
        config, state = case.build()
        save(folder, config, state, torch.float64)
        tokens = random_tokens(config, windows, 16)
        token_windows.save(folder / "windows.safetensors", tokens, {})
        write_statistics(folder / "statistics", site_inputs(state, config, tokens))
        return cls(folder, config, state, tokens, logits(state, config, tokens[:2]))

    @classmethod
    def _of_family(cls, folder: Path, architecture: str, windows: int) -> Given:
        family_models.build(architecture, folder)
        config, state = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
        tokens = random_tokens(config, windows, 16)
        token_windows.save(folder / "windows.safetensors", tokens, {})
        family_models.calibrate(folder, folder / "statistics", tokens)
        return cls(folder, config, state, tokens, streamed_logits(folder, tokens[:2], torch.float64))

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    def context(self, **more: Any) -> TrainingContext:
        return TrainingContext(self.folder, self.folder / "windows.safetensors", **more)


def recipe(
    name: str, wanted: CellSchemes | None = None, seed: int = 0, **options: Any
) -> tuple[ModuleType, dict[str, Any]]:
    """The module of a learned transform and its options."""
    method = registry.method("transforms", name)
    given = method.resolve({"method": name, **options}, name)["options"] | {"seed": seed}
    return registry.load("transforms", name), given | (
        {"schemes": wanted or schemes()} if method.is_fitted_to_scheme(given) else {}
    )


def online_options(name: str, family: str) -> dict[str, str]:
    """Options that make a transform exact on a family with norms behind its linears, an activation that no
    factor passes, or a gate behind its attention; none on another."""
    plan = FAMILIES[family].plan
    fixed = plan.post_norms or not all(site.is_divisible for site in plan.sites.values())
    options = (*(("residual", "division") if fixed else ()), *(() if plan.sites["output_input"].turns else ("values",)))
    return {option: "online" for option in options if option in registry.TRANSFORMS[name].options}


def start(made: Given, name: str, wanted: CellSchemes | None = None, **options: Any) -> Transform:
    module, given = recipe(name, wanted, **{**online_options(name, made.decoder.shape.architecture), **options})
    return fit(module.primitives(**given), made.decoder, made.folder / "statistics")


def shaken(transform: Transform) -> Transform:
    """The same transform as training could leave it: random rotations, scales within a factor of
    two, clip ratios of a half or more."""
    parameters = dict(transform.parameters)
    for name, kind in learned_kinds(transform).items():
        generator, shape = torch.Generator().manual_seed(derived_seed(1, name)), parameters[name].shape
        if kind in ("rotation", "cayley"):
            found = [
                random_orthogonal(shape[-1], derived_seed(1, name, item))
                for item in range(parameters[name].numel() // shape[-1] ** 2)
            ]
            parameters[name] = torch.stack(found).view(shape)
        else:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            parameters[name] = 2 ** (2 * drawn - 1) if kind == "positive" else 0.5 + 0.5 * drawn
    return Transform(transform.primitives, parameters)


class Interrupted(Exception):
    pass


@contextmanager
def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt the training that runs inside right after its ``step``-th step."""
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


def network(made: Given, transform: Transform, wanted: CellSchemes, round_weights: bool = False) -> Network:
    return Network(made.folder, transform, wanted, round_weights, made.tokens)


def logits_of(net: Network, windows: Tensor, values: Parameters) -> Tensor:
    return head_of(net.model)(net.last_hidden(windows, values))


def learned_values(transform: Transform) -> Parameters:
    return {name: transform.parameters[name].float() for name in learned_kinds(transform)}


def learned(made: Given, name: str, wanted: CellSchemes | None = None, context: dict | None = None, **options):
    module, resolved = recipe(name, wanted, **options)
    begun = start(made, name, wanted, **options)
    return begun, module.learn(begun, made.context(**(context or {})), **resolved)


def recipe_of(made: Given, wanted: CellSchemes | None = None, transform: str = "hadamard") -> Recipe:
    fitted = fit(
        random_hadamard.primitives(1) if transform == "hadamard" else [], made.decoder, made.folder / "statistics"
    )
    return Recipe(fitted, wanted or schemes(), None, str(made.folder / "statistics"))


def trained(
    made: Given,
    name: str,
    wanted: CellSchemes | None = None,
    context: dict[str, Any] | None = None,
    seed: int = 0,
    transform: str = "hadamard",
    **options: Any,
) -> Trained:
    method = registry.method("mitigations", name)
    resolved = method.resolve({"method": name, "batch_size": 2, **options}, name)["options"]
    return getattr(registry.load("mitigations", name), name)(
        recipe_of(made, wanted, transform), made.context(**(context or {})), seed=seed, **resolved
    )


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def loaded(done: Trained, folder: Path) -> nn.Module:
    """Model of a trained mitigation, from the checkpoint that it leaves."""
    save_quantized(done.quantized.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return load_quantized(folder)
