"""Sequential propagation: what a site sees behind quantized layers, against the reference decoder,
and where it must equal cached statistics."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantgrid.calibration.accumulators import site_name
from quantgrid.calibration.collect import collect
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import PairedStatistics, SiteStatistics, to_tensors
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_tensors
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.gptaq import gptaq
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.models.plans import LINEARS, SITE_OF, SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized
from quantgrid.quantization.sequential import Sequential, quantize_sequentially
from quantgrid.quantizer import fake_quantize
from quantgrid.quantizer.quantized_weight import Compensated
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes, KeyValueScheme
from quantgrid.transforms.recipes import random_hadamard, scaling
from reference_decoder import logits, site_inputs
from reference_statistics import apply_online, statistics_of
from tiny_decoders import CASES, bare_name, random_tokens, save

INT4, INT8 = scheme("int4"), activation_scheme("int8")
TRANSFORMS = {
    "none": list,
    "hadamard": lambda: random_hadamard.primitives(1),
    "flattening": lambda: scaling.primitives(1.0, list(SITES)),
}
FIELDS = ("mean", "second_moment", "mean_absolute", "minimum", "maximum")


@dataclass
class Given:
    folder: Path
    config: dict
    state: dict
    tokens: Tensor
    statistics: Path

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    def recipe(self, mitigation, transform="none", **schemes) -> Recipe:
        fitted = fit(TRANSFORMS[transform](), self.decoder, self.statistics)
        return Recipe(fitted, CellSchemes(INT4, **schemes), mitigation, str(self.statistics))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def given(request, tmp_path_factory) -> Given:
    case = next(
        case
        for case in CASES
        if case.architecture.lower().startswith(request.param)
        and case.hidden == 64
        and (case.bias or request.param in ("qwen2", "mistral"))
    )
    config, state = case.build(torch.float32)
    folder = save(tmp_path_factory.mktemp(request.param), config, state)
    tokens = random_tokens(config, 8, 24)
    collected = collect(load_full_precision(folder), tokens)
    write_tensors(
        folder / "statistics",
        {name: tensor for site, found in collected.items() for name, tensor in to_tensors(site, found).items()},
    )
    return Given(folder, config, state, tokens, folder / "statistics")


@dataclass(frozen=True)
class Exact(Compensated):
    """Codes for the checkpoint, but the model computes with the weight as it was: a quantizer
    without error."""

    original: Tensor = field(default=None)

    def weight(self) -> Tensor:
        return self.original


class Recording:
    """A mitigation that keeps what it was given and what ``inner`` made of it; ``exact`` lets the
    model go on with the weight itself."""

    def __init__(self, inner=rtn, exact=True):
        self.inner, self.exact, self.given, self.solved = inner, exact, [], []

    def __call__(self, weight: Tensor, statistics: SiteStatistics, of_scheme) -> Compensated:
        solved = self.inner(weight, statistics, of_scheme)
        self.given.append(statistics)
        self.solved.append(solved)
        return Exact(solved.quantized, original=weight) if self.exact else solved

    def by_linear(self, what: list, layers: int = 2) -> dict[tuple[int, str], object]:
        """Entries of ``what`` by (layer, linear): one call per layer and linear, or per linear for
        all layers."""
        if len(what) == len(LINEARS):
            return {(layer, linear): (entry, layer) for linear, entry in zip(LINEARS, what) for layer in range(layers)}
        return {
            (number // len(LINEARS), LINEARS[number % len(LINEARS)]): (entry, 0) for number, entry in enumerate(what)
        }


def run(given: Given, mitigation, transform="none", sequential=True, schemes=None, **how):
    recipe = given.recipe(mitigation, transform, **(schemes or {}))
    if not sequential:
        return quantize_decoder(given.decoder, recipe)
    return quantize_sequentially(given.decoder, recipe, Sequential(given.tokens, **how))


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return (one.double() - other.double()).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("paired", [False, True])
def test_the_first_tokens_of_every_window_are_left_out_here_too(given, paired):
    """With an exact quantizer the statistics equal those of a calibration with the same
    ``skip_first``."""
    recording = Recording()
    run(given, recording, skip_first=3, paired=paired)
    wanted = collect(load_full_precision(given.folder), given.tokens, skip_first=3)
    for (layer, linear), (found, _) in recording.by_linear(recording.given).items():
        statistics = wanted[site_name(layer, SITE_OF[linear])]
        assert found.count == statistics.count == 8 * 21
        assert all(close(getattr(found, name)[0], getattr(statistics, name), 2e-5) for name in FIELDS), (layer, linear)
        assert not paired or found.cross.abs().max() <= 1e-5 * found.second_moment.abs().max()


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_with_unquantized_weights_the_statistics_are_those_of_calibration(given, transform):
    """Collected on the transformed model, and transformed from the collected ones: the same up to
    float32."""
    sequential, cached = Recording(), Recording()
    run(given, sequential, transform)
    run(given, cached, transform, sequential=False)
    wanted = cached.by_linear(cached.given)
    for key, (found, _) in sequential.by_linear(sequential.given).items():
        statistics, layer = wanted[key]
        for name in FIELDS if transform == "none" or SITE_OF[key[1]] == "down_input" else FIELDS[:2]:
            if transform == "none" or name in FIELDS[:2]:
                assert close(getattr(found, name)[0], getattr(statistics, name)[layer], 2e-5), (key, name)
        assert found.count == statistics.count == given.tokens.numel()


@pytest.mark.parametrize("paired", [False, True])
def test_the_largest_inputs_before_a_scaling_are_known_here_too(given, paired):
    sequential, before = Recording(), Recording()
    run(given, sequential, "flattening", paired=paired)
    run(given, before)
    wanted = before.by_linear(before.given)
    for key, (found, _) in sequential.by_linear(sequential.given).items():
        assert close(found.unscaled_maximum, wanted[key][0].maximum_absolute, 1e-4), key
        assert not close(found.maximum_absolute, found.unscaled_maximum, 0.1), key


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_with_a_quantizer_without_error_sequential_is_cached(given, transform):
    sequential, cached = Recording(gptq), Recording(gptq)
    run(given, sequential, transform)
    run(given, cached, transform, sequential=False)
    wanted, differing, total = cached.by_linear(cached.solved), 0, 0
    for key, (found, _) in sequential.by_linear(sequential.solved).items():
        solved, layer = wanted[key]
        differing += int((found.quantized.codes[0] != solved.quantized.codes[layer]).sum())
        total += found.quantized.codes[0].numel()
    assert differing <= 5e-4 * total


@pytest.mark.parametrize("quantized_activations", [False, True])
def test_the_first_site_sees_what_calibration_saw(given, quantized_activations):
    """Nothing is quantized before it; with rounded activations its own input is."""
    sequential, cached = Recording(gptq, exact=False), Recording(gptq, exact=False)
    activation = {site: [INT8] for site in SITES}
    run(given, sequential, schemes={"activation": activation}, quantized_activations=quantized_activations)
    run(given, cached, sequential=False, schemes={"activation": activation})
    found, wanted = sequential.by_linear(sequential.solved), cached.by_linear(cached.solved)
    same = [
        float((found[0, linear][0].quantized.codes[0] == wanted[0, linear][0].quantized.codes[0]).float().mean())
        for linear in LINEARS
    ]
    assert min(same[:3]) > (0.9 if quantized_activations else 0.9995)
    assert close(
        sequential.given[0].second_moment[0], cached.given[0].second_moment[0], 1e-2 if quantized_activations else 1e-6
    )
    assert (
        not close(sequential.given[0].second_moment[0], cached.given[0].second_moment[0], 1e-5)
        or not quantized_activations
    )
    assert max(same[3:]) < 1


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("quantized_activations", [False, True])
def test_every_site_sees_the_quantized_predecessors(given, transform, quantized_activations):
    """The reference decoder in float64 on exactly the weights that were quantized before a site,
    site by site."""
    recording = Recording(partial(gptq_low_rank, rank=3), exact=False)
    activation = {site: [INT8] for site in SITES}
    recipe = given.recipe(recording, transform, activation=activation)
    done = quantize_sequentially(
        given.decoder, recipe, Sequential(given.tokens, quantized_activations, dtype=torch.float64)
    )
    ends, state = given.decoder.ends(), {}
    recipe.transform.fold_ends(ends)
    state = {
        "model.embed_tokens.weight": ends["embedding"],
        "model.norm.weight": ends["final_norm"],
        "lm_head.weight": ends.get("lm_head", ends["embedding"]),
    }
    layers = [given.decoder.layer(index) for index in range(2)]
    for layer in layers:
        recipe.transform.fold_layer(layer)
        names = layer_tensors(layer.shape, layer.index)
        state |= {names[role]: tensor for role, tensor in layer.weights.items()}
    solved, seen = recording.by_linear(recording.solved), recording.by_linear(recording.given)
    for index in range(2):
        for site, linears in SITES.items():
            inputs: dict[tuple[int, str], Tensor] = {}

            def look(at: int, where: str, x: Tensor, inputs=inputs) -> Tensor:
                x = apply_online(layers[at].online[where], x)
                inputs[at, where] = fake_quantize(x, INT8) if quantized_activations else x
                return inputs[at, where]

            logits(state, given.config, given.tokens, look)
            wanted = statistics_of(inputs[index, site].flatten(0, 1))
            found = seen[index, linears[0]][0]
            # transformers' norms compute in float32, which turns a rounding of an activation here
            # and there
            assert close(found.second_moment[0], wanted.second_moment, 2e-3 if quantized_activations else 2e-5), (
                index,
                site,
            )
            for linear in linears:
                name = bare_name(index, linear)
                state[f"{name}.weight"] = solved[index, linear][0].dequantized()[0].double()
    assert done.content.online.keys() == (
        {site_name(i, "down_input") for i in range(2)} if transform == "hadamard" else set()
    )


def test_paired_statistics_are_of_both_models(given):
    """Behind layer 0's first linears the cross moment E[(x* - x) xᵀ] is that of two runs of the
    reference decoder; before them it is 0."""
    recording = Recording(gptq, exact=False)
    run(given, recording, paired=True)
    seen, solved = recording.by_linear(recording.given), recording.by_linear(recording.solved)
    assert all(isinstance(statistics, PairedStatistics) for statistics in recording.given)
    assert (seen[0, "q"][0].cross == 0).all()
    originals = site_inputs(given.state, given.config, given.tokens)
    state = dict(given.state)
    for linear in "qkv":
        state[f"{bare_name(0, linear)}.weight"] = solved[0, linear][0].dequantized()[0]
    x, wanted = site_inputs(state, given.config, given.tokens)[0, "output_input"], originals[0, "output_input"]
    assert close(seen[0, "o"][0].cross[0], (wanted - x).T @ x / len(x), 2e-4)
    assert close(seen[0, "o"][0].second_moment[0], x.T @ x / len(x), 2e-5)


def test_gptaq_runs_beside_the_unquantized_model(given, tmp_path):
    done = run(given, gptaq, "hadamard", paired=True)
    assert all(entry["damping"] == 0.01 for entry in done.details.values())
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {"axes": {}})
    with torch.no_grad():
        assert torch.isfinite(load_quantized(tmp_path)(given.tokens).logits).all()


@pytest.mark.parametrize(
    "mitigation",
    [gptq, partial(sparse_outliers, rank=2), partial(gptq_low_rank, rank=2, branch_input="unquantized")],
    ids=["gptq", "outliers", "branch"],
)
def test_what_was_propagated_is_what_the_checkpoint_computes(given, mitigation, tmp_path):
    """The hidden states behind the last layer, rounded activations and keys and values included,
    against the loaded model's."""
    schemes = {
        "activation": {site: [INT8] for site in SITES},
        "key_value": KeyValueScheme(replace(INT8, granularity="channel"), rotate_keys=True),
    }
    recipe, hidden = given.recipe(mitigation, "hadamard", **schemes), []
    from quantgrid.quantization import sequential as propagation

    class Spy(propagation.RunningLayer):
        def advance(self, states, arguments):
            super().advance(states, arguments)
            hidden.append(states.clone())

    original, propagation.RunningLayer = propagation.RunningLayer, Spy
    try:
        done = quantize_sequentially(given.decoder, recipe, Sequential(given.tokens, quantized_activations=True))
    finally:
        propagation.RunningLayer = original
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {"axes": {}})
    model, outputs = load_quantized(tmp_path), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(given.tokens)
    # the checkpoint's embeddings are bfloat16
    for found, wanted in zip(hidden, outputs, strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_a_model_that_breaks_down_on_the_way_is_a_failure(given):
    def breaking(weight, statistics, of_scheme):
        solved = rtn(weight, statistics, of_scheme)
        return Exact(solved.quantized, original=weight * float("inf"))

    with pytest.raises(NumericalFailure, match="NaN"):
        run(given, breaking)
