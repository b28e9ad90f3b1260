"""Statistics of experts: against their definition in float64, one expert at a time, read and changed when
asked for."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from family_models import build, calibrate, some_tokens
from quantgrid.calibration import experts
from quantgrid.calibration.accumulators import Accumulator, site_name
from quantgrid.calibration.collect import collect, collect_layers, kept_tensors
from quantgrid.calibration.experts import expert_tokens
from quantgrid.calibration.layers import DecoderFolder, DecoderLayer, LaterStatistics, NarrowWeights
from quantgrid.calibration.statistics import SiteStatistics, to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.ground.storage import read_tensors
from quantgrid.inference.transform import ReadsAllLayers, fit, layer_state
from quantgrid.models.plans import SITES
from quantgrid.models.shapes import shape_from_folder
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.named import scheme
from quantgrid.transforms.primitives.affine import Affine
from quantgrid.transforms.primitives.norms import FoldNorms
from quantgrid.transforms.primitives.rotate import RotateDown, RotateResidual
from quantgrid.transforms.primitives.rotate_principal import RotatePrincipal
from quantgrid.transforms.primitives.scale import Scale
from quantgrid.transforms.primitives.searched_scale import SearchedPower
from reference_statistics import FIELDS, close, statistics_of

ARCHITECTURE, SPARSE, EXPERTS, CHOSEN = "Qwen2MoeForCausalLM", (0, 2), 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build(ARCHITECTURE, tmp_path_factory.mktemp("experts") / "model")


@torch.no_grad()
def tokens_of_experts(folder: Path, tokens: Tensor, skip_first: int, everyone: bool) -> dict[tuple[int, int], Tensor]:
    """(layer, expert) -> inputs (tokens, n) of its down projection in transformers' own model, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    found: dict[tuple[int, int], Tensor] = {}
    for layer in SPARSE:
        block = model.model.layers[layer].mlp.experts

        def look(_module, inputs, layer=layer, block=block):
            hidden, chosen = (part.unflatten(0, tokens.shape)[:, skip_first:].flatten(0, 1) for part in inputs[:2])
            for expert in range(EXPERTS):
                mine = hidden if everyone else hidden[(chosen == expert).any(-1)]
                gate, up = (mine @ block.gate_up_proj[expert].T).chunk(2, -1)
                found[layer, expert] = block.act_fn(gate) * up

        block.register_forward_pre_hook(look)
    model(tokens, use_cache=False)
    return found


def shrunk(moment: Tensor, count: int) -> Tensor:
    """(1 - l) C + l diag(C) with l = n / (n + N), entry by entry."""
    n = len(moment)
    weight = n / (n + count)
    return moment * (1 - weight) + weight * torch.diag(moment.diagonal())


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("skip_first", [0, 5])
def test_statistics_are_those_of_the_tokens_of_an_expert(folder, skip_first, everyone):
    tokens = some_tokens(4, 24)
    found = collect(streamed(FullPrecision(folder)), tokens, 16, skip_first=skip_first, everyone=everyone)
    counts = []
    for (layer, expert), x in tokens_of_experts(folder, tokens, skip_first, everyone).items():
        ours, wanted = found[site_name(layer, f"down_input.{expert}")], statistics_of(x)
        counts.append(ours.count)
        assert ours.count == len(x)
        assert close(ours.second_moment, shrunk(wanted.second_moment, len(x)), 1e-5)
        assert not close(ours.second_moment, wanted.second_moment, 1e-2)
        assert all(
            close(getattr(ours, part), getattr(wanted, part), 1e-5) for part in FIELDS if part != "second_moment"
        )
        distances = torch.cdist(ours.samples.double(), x)
        assert distances.min(-1).values.max() < 1e-4 * x.norm(dim=-1).max()
    seen = 4 * (24 - skip_first)
    assert counts == [seen] * len(counts) if everyone else sum(counts) == len(SPARSE) * CHOSEN * seen
    shared = found[site_name(0, "down_input.shared")]
    assert shared.count == seen and found[site_name(1, "down_input")].count == seen


def test_an_expert_without_tokens_has_the_identity(folder):
    """One token chooses three of six experts; the sample of the others is zeros."""
    found = collect(streamed(FullPrecision(folder)), some_tokens(1, 2), 16, skip_first=1)
    of_experts = [found[site_name(0, f"down_input.{expert}")] for expert in range(EXPERTS)]
    assert sorted(statistics.count for statistics in of_experts) == [0] * CHOSEN + [1] * CHOSEN
    for statistics in of_experts:
        assert statistics.samples.shape == of_experts[0].samples.shape
        if not statistics.count:
            assert torch.equal(statistics.second_moment, torch.eye(48, dtype=torch.float64))
            assert not any(getattr(statistics, part).any() for part in (*FIELDS, "samples") if part != "second_moment")


@pytest.mark.parametrize("kept", [False, True])
def test_one_second_moment_is_in_memory_at_a_time(folder, kept, monkeypatch):
    """Unless the caller keeps the results."""
    moments: list[weakref.ref] = []
    most = [0]

    class Watched(Accumulator):
        def add(self, x: Tensor) -> None:
            super().add(x)
            if self.count == len(x):
                moments.append(weakref.ref(self.sums["second_moment"]))
                most[0] = max(most[0], sum(moment() is not None for moment in moments))

    def watched(statistics: SiteStatistics) -> SiteStatistics:
        found = original(statistics)
        moments.append(weakref.ref(found.second_moment))
        return found

    original = experts.shrunk
    monkeypatch.setattr(experts, "Accumulator", Watched)
    monkeypatch.setattr(experts, "shrunk", watched)
    results = []
    for found in collect_layers(streamed(FullPrecision(folder)), some_tokens(4, 24), 16):
        while found:
            results += [found.popitem()] * kept
    assert len(moments) == 2 * EXPERTS * len(SPARSE)
    assert most[0] == (EXPERTS * len(SPARSE) if kept else 1)


@pytest.mark.parametrize("skip_first", [0, 5])
def test_the_file_of_statistics_holds_what_was_announced(folder, skip_first):
    tokens, seed = some_tokens(3, 16), 2
    announced = kept_tensors(shape_from_folder(folder), tokens, 20, seed, skip_first)
    found = collect(streamed(FullPrecision(folder)), tokens, 20, seed, skip_first=skip_first)
    written = {key: tensor for name, one in found.items() for key, tensor in to_tensors(name, one).items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in announced.items()
    }


def test_tokens_of_experts_are_counted(folder, tmp_path):
    tokens = some_tokens(4, 24)
    path = calibrate(folder, tmp_path / "statistics", tokens)
    ratios = sorted(len(x) / 48 for x in tokens_of_experts(folder, tokens, 0, False).values())
    assert expert_tokens(shape_from_folder(folder), path) == pytest.approx(
        {
            "expert_tokens_smallest": ratios[0],
            "expert_tokens_median": (ratios[5] + ratios[6]) / 2,
            "experts_below_width": sum(ratio < 1 for ratio in ratios) / 12,
        }
    )
    assert 0 < sum(ratio < 1 for ratio in ratios) < 12
    assert expert_tokens(shape_from_folder(folder), None) == {}
    dense = build("LlamaForCausalLM", tmp_path / "dense")
    assert expert_tokens(shape_from_folder(dense), path) == {}


# -- a layer during a transform --------------------------------------------------------------------


def eager(layer: DecoderLayer, path: Path) -> DecoderLayer:
    """The same layer with all weights in float64 and all statistics in memory."""
    weights = {role: layer.weights[role] for role in layer.weights}
    return DecoderLayer(layer.index, layer.shape, weights, {site: layer.statistics[site] for site in layer.plan.sites})


def test_what_is_read_later_and_kept_in_float32_is_what_is_held(folder, tmp_path):
    path = calibrate(folder, tmp_path / "statistics", some_tokens(4, 24))
    decoder = DecoderFolder(folder)
    primitives = [
        FoldNorms(),
        Scale(0.5, ["mlp_input", "down_input"]),
        RotateResidual("hadamard", 1),
        RotateDown(),
        Affine(list(SITES), 1),
    ]
    transform = fit(primitives, decoder, path)
    ours = layer_state(decoder, 0, path)
    held = eager(layer_state(decoder, 0, path), path)
    assert isinstance(ours.weights, NarrowWeights) and isinstance(ours.statistics, LaterStatistics)
    for layer in (ours, held):
        transform.fold_layer(layer)
    assert ours.online.keys() == held.online.keys() and set(ours.weights) == set(held.weights)
    narrow = [role for role in ours.weights if "." in role]
    assert len(narrow) == 3 * (EXPERTS + 1)
    for role, weight in held.weights.items():
        assert ours.weights[role].dtype == weight.dtype == torch.float64
        assert close(ours.weights[role], weight, 1e-6 if role in narrow else 1e-12), role
    assert all(dict.__getitem__(ours.weights, role).dtype == torch.float32 for role in narrow)
    before = {name: tensor for name, tensor in read_tensors(path).items() if name.endswith("second_moment")}
    for site in ours.plan.sites:
        one, other = ours.statistics[site], held.statistics[site]
        assert one.count == other.count and one.estimated == other.estimated
        assert all(close(getattr(one, part), getattr(other, part), 1e-6) for part in (*FIELDS, "samples")), site
        assert not close(one.second_moment.float(), before[f"{site_name(0, site)}.second_moment"], 1e-2)
    assert not set(ours.plan.expert_sites) & set(dict.keys(ours.statistics))


class _Watched(NarrowWeights):
    """Narrow weights that count how many of those given in float64 are alive at once."""

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer.weights.narrow, {role: dict.__getitem__(layer.weights, role) for role in layer.weights})
        self.given: list[weakref.ref] = []
        self.most = 0

    def __getitem__(self, role: str) -> Tensor:
        found = super().__getitem__(role)
        if role in self.narrow:
            self.given.append(weakref.ref(found))
            self.most = max(self.most, sum(given() is not None for given in self.given))
        return found


FITTED_TO_ALL = {
    "searched scales": SearchedPower(["mlp_input"], 3, False, CellSchemes(scheme("int4"))),
    "principal axes of weights": RotatePrincipal("hadamard", 1, "weights"),
}


@pytest.mark.parametrize("name", FITTED_TO_ALL)
def test_a_fit_to_all_experts_holds_one_of_them_in_float64(name, folder, tmp_path):
    layer = layer_state(DecoderFolder(folder), 0, calibrate(folder, tmp_path / "statistics", some_tokens(4, 24)))
    layer.weights = watched = _Watched(layer)
    primitive = FITTED_TO_ALL[name]
    primitive.fit_layers([layer]) if isinstance(primitive, ReadsAllLayers) else primitive.fit_layer(layer)
    assert len(watched.given) >= 2 * (EXPERTS + 1) and watched.most == 1
