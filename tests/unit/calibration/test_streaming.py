"""Streamed models against whole ones, bit for bit: calibration, reference states, losses and
residual errors, in every architecture; and the files that are written piece by piece against those
of safetensors itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantgrid.calibration.collect import collect, collect_layers, kept_tensors
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.evaluation.perplexity import evaluate, final_hidden
from quantgrid.evaluation.residual_error import error_growth
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_metadata, write_tensors
from quantgrid.ground.tensor_files import TensorSpool, write_each, writing
from quantgrid.inference import transform as composition
from quantgrid.inference.transform import Transform, fit, folded_ends
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import PackedCheckpoint, load_full_precision, load_quantized, save_quantized
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes, KeyValueScheme
from quantgrid.transforms.recipes import random_hadamard
from selection import others_slow
from tiny_decoders import CASES, random_tokens, save

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
CHOSEN = {
    "llama, tied, biases": (next(case for case in CASES if case.bias and case.tied), {}),
    "mistral, sliding window": (
        next(case for case in CASES if case.architecture.startswith("Mistral")),
        {"sliding_window": 4},
    ),
    "qwen2, one sliding layer": (
        next(case for case in CASES if case.architecture.startswith("Qwen2") and not case.tied),
        SLIDING,
    ),
    "qwen3, wide heads": (next(case for case in CASES if case.bias and case.head_dim == 32), {}),
}
BATCH = 2  # of five windows: the last one is alone


@pytest.fixture(scope="module", params=CHOSEN)
def given(request, tmp_path_factory):
    """(model folder with statistics in it, five windows of tokens)."""
    case, change = CHOSEN[request.param]
    config, state = case.build(torch.float32)
    folder, tokens = save(tmp_path_factory.mktemp("model"), {**config, **change}, state), random_tokens(config, 5, 12)
    found = collect(load_full_precision(folder), tokens, samples=16)
    write_tensors(
        folder / "statistics",
        {name: tensor for site, kept in found.items() for name, tensor in to_tensors(site, kept).items()},
    )
    return folder, tokens


def whole_states(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states after the final norm, by transformers' forward pass of the whole model, batch
    by batch."""
    with torch.no_grad():
        return torch.cat([model.model(batch, use_cache=False).last_hidden_state for batch in tokens.split(BATCH)])


def packed(folder, into, key_value=None, tensors=None):
    """A checkpoint with an online rotation, static and dynamic rounding and low-rank branches in
    ``into``."""
    transform = fit(random_hadamard.primitives(1), DecoderFolder(folder), folder / "statistics")
    activation = {
        "attention_input": [scheme("int4", granularity="tensor")],
        "down_input": [scheme("int4", granularity="channel")],
    }
    recipe = Recipe(
        transform, CellSchemes(scheme("int4"), activation, key_value), partial(low_rank, rank=3), folder / "statistics"
    )
    done = quantize_decoder(DecoderFolder(folder), recipe, packed=tensors)
    save_quantized(done.content, into / "model.safetensors", into / "quantgrid.json", {"axes": {}})
    return done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_precision_streams_to_the_bits_of_the_whole_model(dtype, given):
    folder, tokens = given
    model, whole = streamed(FullPrecision(folder, dtype)), load_full_precision(folder, dtype)
    assert torch.equal(final_hidden(model, tokens, BATCH), whole_states(whole, tokens))
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    one, other = collect(model, tokens, samples=16), collect(whole, tokens, samples=16)
    assert one.keys() == other.keys()
    for name, statistics in one.items():
        wanted = to_tensors(name, other[name])
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in to_tensors(name, statistics).items()), name


@pytest.mark.parametrize(
    "key_value", others_slow([None, KeyValueScheme(scheme("int4"), rotate_keys=True)], bool), ids=["", "cache rounded"]
)
def test_a_packed_checkpoint_streams_to_the_losses_of_the_whole_model(key_value, given, tmp_path):
    folder, tokens = given
    packed(folder, tmp_path, key_value)
    whole, model, original = load_quantized(tmp_path), streamed(PackedCheckpoint(tmp_path)), load_full_precision(folder)
    states = whole_states(whole, tokens)
    assert torch.equal(final_hidden(model, tokens, BATCH), states) and not torch.equal(
        states, whole_states(original, tokens)
    )
    reference, head = whole_states(original, tokens), DecoderFolder(folder).head(torch.float32)
    assert torch.equal(head.weight, original.lm_head.weight)
    assert evaluate(model, tokens, reference, lambda: head, BATCH) == evaluate(
        whole, tokens, reference, lambda: head, BATCH
    )
    assert error_growth(model, streamed(FullPrecision(folder)), tokens) == error_growth(whole, original, tokens)


def test_one_layer_at_a_time_has_its_weights(given):
    folder, tokens = given
    model, held = streamed(FullPrecision(folder)), []
    layers = list(model.model.layers.children())

    def watching(indices):
        for index in indices:
            yield index
            held.append([not any(p.is_meta for p in layer.parameters()) for layer in layers])

    final_hidden(model, tokens, BATCH, watching)
    assert held[:-1] == [[True, False]] and not any(
        p.is_meta for p in [*model.model.norm.parameters(), model.lm_head.weight]
    )
    assert all(p.is_meta for layer in layers for p in layer.parameters()), "the last one was emptied too"


def test_a_layer_that_is_not_whole_is_refused_by_name(given, tmp_path):
    folder, tokens = given
    config, state = DecoderFolder(folder).config, load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        ConfigError, match=rf"{tmp_path}: tensor model.layers.1.mlp.up_proj.weight is missing \(1 in all\)"
    ):
        final_hidden(streamed(FullPrecision(save(tmp_path, config, state))), tokens, BATCH)
    del state["model.embed_tokens.weight"]
    with pytest.raises(ConfigError, match="tensor model.embed_tokens.weight is missing"):
        streamed(FullPrecision(save(tmp_path, config, state)))


def test_statistics_written_layer_by_layer_are_the_file_of_all_of_them(given, tmp_path):
    folder, tokens = given
    arguments = {"samples": 16, "seed": 3, "skip_first": 2}
    model = streamed(FullPrecision(folder))
    with writing(
        tmp_path / "streamed", kept_tensors(DecoderFolder(folder).shape, tokens, **arguments), {"axes": "é"}
    ) as put:
        for layer in collect_layers(model, tokens, **arguments):
            for site, statistics in layer.items():
                for name, tensor in to_tensors(site, statistics).items():
                    put(name, tensor)
    found = collect(load_full_precision(folder), tokens, **arguments)
    tensors = {name: tensor for site, kept in found.items() for name, tensor in to_tensors(site, kept).items()}
    write_tensors(tmp_path / "whole", tensors, {"axes": "é"})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes() and read_metadata(
        tmp_path / "streamed"
    ) == {"axes": "é"}


def test_a_spooled_checkpoint_is_the_file_of_one_held_in_memory(given, tmp_path):
    folder, _ = given
    done = packed(folder, tmp_path / "held")
    spooled = packed(folder, tmp_path / "spooled", tensors=TensorSpool(tmp_path / "spooled"))
    for name in ("model.safetensors", "quantgrid.json"):
        assert (tmp_path / "spooled" / name).read_bytes() == (tmp_path / "held" / name).read_bytes()
    assert done.costs == spooled.costs
    save_file(
        {name: tensor.contiguous() for name, tensor in done.content.tensors.items()},
        tmp_path / "library",
        metadata={"quantgrid": "{}"},
    )
    assert (tmp_path / "library").read_bytes() == (tmp_path / "held" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "spooled").iterdir()) == ["model.safetensors", "quantgrid.json"]


@pytest.mark.parametrize("rows", [1, 7, 61, 1000])
def test_ends_folded_in_blocks_of_rows_are_those_folded_at_once(rows, given, monkeypatch):
    folder, _ = given
    decoder, transform = DecoderFolder(folder), fit(random_hadamard.primitives(1), DecoderFolder(folder), None)
    monkeypatch.setattr(composition, "ROWS", rows)
    for fitted in (transform, Transform()):
        wanted = decoder.ends()
        fitted.fold_ends(wanted)
        found = folded_ends(fitted, decoder, torch.bfloat16)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[role], wanted[role].to(found[role].dtype)) for role in wanted)


# -- files of tensors ------------------------------------------------------------------------------


def assorted() -> dict[str, Tensor]:
    """A tensor of every dtype that files hold, of every kind of shape, in no order."""
    made = {
        "b.scalar": torch.tensor(3.5),
        "a.empty": torch.zeros(0, 4),
        "z.count": torch.tensor(7),
        "turned": torch.arange(6.0).view(2, 3).mT,
    }
    for number, dtype in enumerate(
        [
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ]
    ):
        made[f"layers.{number}"] = torch.arange(5 + number).to(dtype)
    return made | {"exponents": torch.arange(3, dtype=torch.uint8).view(torch.float8_e8m0fnu)}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))
    )


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    tensors = assorted()
    write_tensors(tmp_path / "library", tensors, {"said": 'so "it" is\n'})
    write_each(tmp_path / "ours", tensors, {"said": 'so "it" is\n'})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    with writing(
        tmp_path / "backwards", {name: tensor.to("meta") for name, tensor in tensors.items()}, {"said": 'so "it" is\n'}
    ) as put:
        for name in reversed(tensors):
            put(name, tensors[name])
    assert (tmp_path / "backwards").read_bytes() == (tmp_path / "library").read_bytes()


def test_what_was_not_announced_or_never_came_leaves_no_file(tmp_path):
    announced = {"x": torch.zeros(2, 3), "y": torch.zeros(2)}
    for spoilt, message in (
        ({"x": torch.zeros(3, 2)}, "declared as F32"),
        ({"x": torch.zeros(2, 3).double()}, "declared as F32"),
        ({"x": torch.zeros(2, 3)}, "tensor y was declared and not written"),
    ):
        with pytest.raises(ValueError, match=message), writing(tmp_path / "file", announced, {}) as put:
            for name, tensor in spoilt.items():
                put(name, tensor)
        assert not list(tmp_path.iterdir())


def test_a_spool_gives_back_what_it_was_given_and_leaves_nothing(tmp_path):
    tensors, spool = assorted(), TensorSpool(tmp_path)
    spool.update(tensors)
    spool["layers.3"] = torch.ones(9)
    tensors["layers.3"] = torch.ones(9)
    del spool["turned"], tensors["turned"]
    assert list(spool) == list(tensors) and all(same_bytes(spool[name], tensors[name]) for name in tensors)
    with pytest.raises(KeyError):
        spool["turned"]
    assert not list(tmp_path.iterdir())
