"""Keys and values of the running model: R3 changes nothing, rounding is that of the definition, and
a cache would see the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.storage import read_json
from quantgrid.inference.key_values import KeyValues, round_key_values
from quantgrid.inference.linear import Rounding
from quantgrid.inference.transform import Transform
from quantgrid.linalg.hadamard import hadamard_matrix
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import SITES
from quantgrid.models.skeletons import attention_of
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import activation_scheme
from quantgrid.schemes.cell_schemes import CellSchemes, KeyValueScheme
from reference_decoder import logits, site_inputs
from reference_statistics import close, write_statistics
from tiny_decoders import CASES, Case, random_tokens, save

VARIED = [
    next(case for case in CASES if case.architecture.startswith(name) and want(case))
    for name, want in (
        ("Llama", lambda c: c.heads == 9 and c.tied),
        ("Llama", lambda c: c.bias),
        ("Qwen2", lambda c: not c.tied),
        ("Qwen3", lambda c: c.bias),
        ("Mistral", lambda c: c.head_dim == 32),
    )
]
SCHEMES = {
    "int4": activation_scheme("int4"),
    "int4 in groups": activation_scheme("int4", group_size=8),
    "nvfp4 per token": activation_scheme("nvfp4", granularity="token"),
    "int3 symmetric": activation_scheme("int3", symmetric=True),
}
ROTATED = [False, True]


def by_heads(prepare):
    """A function of (batch, heads, time, head_dim) as the reference decoder's hook, whose heads
    come after time."""
    return lambda layer, *states: tuple(x.transpose(1, 2) for x in prepare(*(x.transpose(1, 2) for x in states)))


def defined(scheme, rotate: bool, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R3 by a dense matrix, then every vector of a head rounded by itself."""
    if rotate:
        matrix = hadamard_matrix(key.shape[-1]).to(key) / key.shape[-1] ** 0.5
        query, key = query @ matrix, key @ matrix

    def rounded(x: Tensor) -> Tensor:
        vectors = x.reshape(-1, 1, x.shape[-1])
        return torch.stack([fake_quantize(vector, scheme) for vector in vectors]).view(x.shape)

    return query, rounded(key), rounded(value)


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_rotated_keys_change_nothing_without_rounding(case: Case):
    config, state = case.build()
    tokens = random_tokens(config)
    reference, seen = logits(state, config, tokens), []
    prepared = KeyValues(None, rotate_keys=True)
    found = logits(state, config, tokens, heads=by_heads(lambda *states: seen.append(states) or prepared(*states)))
    assert close(found, reference, 1e-9) and not close(prepared(*seen[0])[1], seen[0][1], 1e-2)
    keys_alone = logits(state, config, tokens, heads=by_heads(lambda q, k, v: (q, prepared(q, k, v)[1], v)))
    assert not close(keys_alone, reference, 1e-3)


@pytest.mark.parametrize("rotate", ROTATED)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_module_rounds_by_its_definition(name, rotate):
    query, key, value = (
        torch.randn(2, heads, 5, 16, generator=torch.Generator().manual_seed(heads)).double() for heads in (4, 2, 2)
    )
    prepared = KeyValues(Rounding(SCHEMES[name], {}), rotate)(query, key, value)
    wanted = defined(SCHEMES[name], rotate, query, key, value)
    assert close(prepared[0], wanted[0], 1e-12) and all(close(a, b, 1e-6) for a, b in zip(prepared[1:], wanted[1:]))
    assert not close(prepared[1], key, 1e-3)


@pytest.mark.parametrize("rotate", ROTATED)
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_a_running_model_attends_to_rounded_keys_and_values(case: Case, rotate, tmp_path):
    """Against the reference decoder whose hook rounds what the model's own attention was given: its
    norms work in float32."""
    config, state = case.build(torch.float32)
    tokens = random_tokens(config, 2, 24)
    model = load_full_precision(save(tmp_path, config, state), torch.float64)
    with torch.no_grad():
        plain = model(tokens).logits
    assert close(plain, logits(state, config, tokens), 1e-5)
    seen: dict[int, tuple] = {}
    scheme = SCHEMES["int4"]
    round_key_values(model, KeyValueScheme(scheme, rotate))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.key_values.register_forward_hook(
            partial(lambda index, module, given, made: seen.update({index: (given, made)}), index)
        )
    with torch.no_grad():
        found = model(tokens).logits

    def hook(layer, *states):
        given, made = seen[layer]
        assert all(close(a.transpose(1, 2), b, 1e-5) for a, b in zip(given, states))
        assert all(close(a, b, 1e-6) for a, b in zip(made, defined(scheme, rotate, *given)))
        return tuple(x.transpose(1, 2) for x in made)

    assert close(found, logits(state, config, tokens, heads=hook), 1e-5) and not close(found, plain, 1e-2)


def test_sliding_windows_and_padding_still_hold(tmp_path):
    config, state = Case("MistralForCausalLM").build(torch.float32)
    model = load_full_precision(save(tmp_path, {**config, "sliding_window": 4}, state))
    tokens, mask = random_tokens(config, 2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        wanted = [model(tokens).logits, model(tokens, attention_mask=mask).logits[:, 5:]]
        round_key_values(model, KeyValueScheme(activation_scheme("int8", symmetric=True)))
        for layer in model.model.layers:
            layer.self_attn.key_values.rounding = None
        assert torch.equal(model(tokens).logits, wanted[0]) and torch.equal(
            model(tokens, attention_mask=mask).logits[:, 5:], wanted[1]
        )


@pytest.mark.parametrize("rotate", ROTATED)
@pytest.mark.parametrize(
    "family, attention, setting",
    [
        ("Gemma2ForCausalLM", "eager", {"attn_logit_softcapping": None}),
        ("Gemma2ForCausalLM", "eager", {"sliding_window": 4}),
        ("MinistralForCausalLM", "sdpa", {"sliding_window": 4}),
        ("GraniteForCausalLM", "sdpa", {"attention_multiplier": 0.25}),
    ],
)
@torch.no_grad()
def test_a_family_keeps_its_own_attention(family, attention, setting, rotate, family_model):
    """Without rounding the logits are those of the untouched model: softcaps of scores, sliding windows and
    scales are its own, and each of them counts."""
    made = family_model(family)
    model = load_full_precision(made.folder)
    assert attention_of(model) == attention
    plain = model(made.tokens, use_cache=False).logits
    round_key_values(model, KeyValueScheme(SCHEMES["int4"], rotate))
    for layer in model.model.layers:
        layer.self_attn.key_values.rounding = None
    found = model(made.tokens, use_cache=False).logits
    assert close(found, plain, 1e-5) if rotate else torch.equal(found, plain)
    other = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, **setting).eval()
    assert not close(other(made.tokens, use_cache=False).logits, plain, 1e-3)


@pytest.mark.parametrize("rotate", ROTATED)
def test_a_full_window_sees_what_decoding_from_a_cache_sees(rotate, tmp_path):
    config, state = Case("LlamaForCausalLM").build(torch.float32)
    model, tokens = load_full_precision(save(tmp_path, config, state), torch.float64), random_tokens(config, 2, 10)
    round_key_values(model, KeyValueScheme(SCHEMES["int4"], rotate))
    with torch.no_grad():
        whole, cache, steps = model(tokens).logits, None, []
        for token in tokens.split(1, dim=1):
            done = model(token, past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            steps.append(done.logits)
    assert close(torch.cat(steps, 1), whole, 1e-6)


def test_another_model_is_left_alone(tmp_path):
    config, state = Case("LlamaForCausalLM").build(torch.float32)
    one, other, tokens = (*(load_full_precision(save(tmp_path, config, state)) for _ in "ab"), random_tokens(config))
    with torch.no_grad():
        before = other(tokens).logits
        round_key_values(one, KeyValueScheme(SCHEMES["int4"]))
        assert torch.equal(other(tokens).logits, before) and not torch.equal(one(tokens).logits, before)


@pytest.mark.parametrize(
    "wanted",
    [None, KeyValueScheme(SCHEMES["int4"]), KeyValueScheme(SCHEMES["int4"], True)],
    ids=["off", "int4", "rotated"],
)
def test_a_checkpoint_keeps_how_keys_and_values_are_rounded(wanted, tmp_path):
    config, state = Case("Qwen2ForCausalLM").build(torch.float32)
    folder, tokens = save(tmp_path / "model", config, state), random_tokens(config, 4, 16)
    statistics = write_statistics(folder / "statistics", site_inputs(state, config, tokens))
    activation = {site: [activation_scheme("int8")] for site in SITES}
    plain, done = (
        quantize_decoder(
            DecoderFolder(folder), Recipe(Transform(), CellSchemes(None, activation, key_value), rtn, statistics)
        )
        for key_value in (None, wanted)
    )
    for content, name in ((plain.content, "plain"), (done.content, "done")):
        save_quantized(content, tmp_path / name / "model.safetensors", tmp_path / name / "quantgrid.json", {"axes": {}})
    assert read_json(tmp_path / "done" / "quantgrid.json")["schemes"]["key_value"] == (wanted and wanted.to_dict())
    model, other = load_quantized(tmp_path / "done"), load_quantized(tmp_path / "plain")
    with torch.no_grad():
        before = other(tokens).logits
        if wanted:
            round_key_values(other, wanted)
        assert torch.equal(model(tokens).logits, other(tokens).logits)
        assert torch.equal(model(tokens).logits, before) == (wanted is None)
