"""Routers of transformed models choose the experts that they chose, and a router that a transform forgot is
refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from family_models import some_tokens
from learned_cases import EXPERTS, QUICK_EXPERTS, SPARSE, Given, shaken, start
from quantgrid.evaluation.gates import check_transform, streamed_logits, transformed_logits
from quantgrid.ground.errors import ConfigError
from quantgrid.inference.transform import Transform, fit
from quantgrid.models.plans import Site
from quantgrid.transforms.primitives.rotate import RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.primitives.scale import Scale
from quantgrid.transforms.primitives.shift import Shift
from selection import others_slow

MARGIN = 1e-4  # of router logits, below which a choice may change
SCALED = ["attention_input", "mlp_input"]
FIXED = {
    "scaling": lambda: [Scale(0.5, SCALED)],
    "rotation": lambda: [RotateResidual("hadamard", 1), RotateHeads(1, online=True), RotateDown()],
    "online": lambda: [Shift("median", ["mlp_input"]), RotateResidual("orthogonal", 1, online=True)],
}
LEARNED = ("flatquant", "optimized_rotation_scaling")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    made: dict[str, Given] = {}

    def of(architecture: str) -> Given:
        if architecture not in made:
            made[architecture] = Given.make(tmp_path_factory.mktemp("routing"), architecture)
        return made[architecture]

    return of


def routed(run: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(logits, sorted choices) of every router that runs, in order: both (tokens, k)."""
    found = []

    def look(module, _inputs, output):
        if type(module).__name__.endswith(("Router", "MoEV1Gate")):
            found.append((output[0], output[2].sort(-1).values))

    handle = register_module_forward_hook(look)
    try:
        run()
    finally:
        handle.remove()
    return found


def transform_of(made: Given, name: str) -> Transform:
    if name in LEARNED:
        return shaken(start(made, name))
    return fit(FIXED[name](), made.decoder, made.folder / "statistics")


@pytest.mark.parametrize(
    "architecture, name",
    others_slow(
        [(architecture, name) for architecture in EXPERTS for name in (*FIXED, *LEARNED)],
        lambda architecture, name: architecture == SPARSE or (name == "scaling" and architecture in QUICK_EXPERTS),
    ),
)
def test_a_transformed_model_chooses_the_same_experts(architecture, name, given):
    made, tokens = given(architecture), some_tokens(4, 32)
    transform = transform_of(made, name)
    wanted = routed(lambda: streamed_logits(made.folder, tokens))
    found = routed(lambda: transformed_logits(made.decoder, transform, tokens))
    layers = sum(map(made.decoder.shape.is_sparse, range(made.decoder.shape.layers)))
    assert len(found) == len(wanted) == layers
    for (_, ours), (logits, theirs) in zip(found, wanted):
        best = logits.sort(-1, descending=True).values
        clear = best[:, ours.shape[-1] - 1] - best[:, ours.shape[-1]] > MARGIN
        assert clear.float().mean() > 0.98 and ours.shape[0] == tokens.numel()
        assert torch.equal(ours[clear], theirs[clear])
        assert len(theirs.unique()) == made.decoder.shape.experts


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("architecture", others_slow(EXPERTS, QUICK_EXPERTS.__contains__))
def test_a_router_that_a_scaling_forgets_is_refused(architecture, forgotten, given, monkeypatch):
    made = given(architecture)
    transform = transform_of(made, "scaling")
    if not forgotten:
        check_transform("tiny", "scaling", made.decoder, transform, made.tokens[:2])
        return
    monkeypatch.setattr(Site, "consumers", property(lambda site: site.linears))
    with pytest.raises(
        ConfigError, match=r"transforms\.scaling changes the function of tiny before anything is rounded"
    ):
        check_transform("tiny", "scaling", made.decoder, transform, made.tokens[:2])
