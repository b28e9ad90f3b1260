"""The oracle agrees with transformers on every tiny decoder, and would notice what it is there to
notice."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from reference_decoder import logits, site_inputs
from tiny_decoders import CASES, Case, random_tokens, save

GQA = Case("LlamaForCausalLM", heads=4, kv_heads=2)


def transformers_logits(folder, config, state, tokens, dtype):
    model, loading = AutoModelForCausalLM.from_pretrained(
        save(folder, config, state, dtype), dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    with torch.no_grad():
        return model(tokens).logits.double()


def relative_difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_transformers(case, dtype, tmp_path):
    config, state = case.build(dtype)
    tokens = random_tokens(config)
    ours = logits(state, config, tokens)
    assert ours.dtype == torch.float64 and ours.shape == (2, 12, config["vocab_size"])
    assert relative_difference(ours, transformers_logits(tmp_path, config, state, tokens, dtype)) < 1e-5


def rows_by_head(tensor, heads, order):
    return tensor.unflatten(0, (heads, -1))[order].flatten(0, 1)


def test_a_wrong_head_order_fails(tmp_path):
    """Query heads dealt out to the KV heads in turn (0,1,0,1) instead of in blocks (0,0,1,1): the
    classic GQA mistake."""
    config, state = GQA.build()
    tokens, order = random_tokens(config), [0, 2, 1, 3]
    wrong = dict(state)
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn."
        wrong[attention + "q_proj.weight"] = rows_by_head(state[attention + "q_proj.weight"], 4, order)
        wrong[attention + "o_proj.weight"] = rows_by_head(state[attention + "o_proj.weight"].T, 4, order).T
    theirs = transformers_logits(tmp_path, config, state, tokens, torch.float64)
    assert relative_difference(logits(state, config, tokens), theirs) < 1e-5
    assert relative_difference(logits(wrong, config, tokens), theirs) > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_matters(case):
    """No tensor of a case may be invisible to the oracle: a fold that forgets it would pass. (A key
    bias alone is nearly cancelled by softmax.)"""
    config, state = case.build()
    tokens = random_tokens(config)
    reference = logits(state, config, tokens)
    for name, tensor in state.items():
        changed = logits(
            {**state, name: tensor + 0.1 * torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view_as(tensor)},
            config,
            tokens,
        )
        assert relative_difference(changed, reference) > 1e-6, name


def test_attention_is_causal():
    config, state = GQA.build()
    tokens = random_tokens(config)
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % config["vocab_size"]
    before, after = logits(state, config, tokens), logits(state, config, later)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


def test_online_sees_every_site_once_with_its_width():
    config, state = Case("Qwen3ForCausalLM", head_dim=32).build()
    tokens = random_tokens(config)
    calls = []
    same = logits(state, config, tokens, online=lambda layer, site, x: calls.append((layer, site, tuple(x.shape))) or x)
    widths = {"attention_input": 64, "output_input": 128, "mlp_input": 64, "down_input": 96}
    assert calls == [(layer, site, (2, 12, width)) for layer in range(2) for site, width in widths.items()]
    assert torch.equal(same, logits(state, config, tokens))
    inputs = site_inputs(state, config, tokens)
    assert {key: tuple(x.shape) for key, x in inputs.items()} == {
        (layer, site): (24, width) for layer, site, (_, _, width) in calls
    }


def test_online_transform_undone_in_the_weight_changes_nothing():
    config, state = GQA.build()
    tokens = random_tokens(config)
    scales = torch.linspace(0.5, 2, config["intermediate_size"], dtype=torch.float64)
    folded = {name: tensor * scales if name.endswith("down_proj.weight") else tensor for name, tensor in state.items()}
    reference = logits(state, config, tokens)
    online = logits(folded, config, tokens, online=lambda layer, site, x: x / scales if site == "down_input" else x)
    assert relative_difference(online, reference) < 1e-12
    assert relative_difference(logits(folded, config, tokens), reference) > 1e-2


def test_rope_theta_of_transformers_4_and_5(tmp_path):
    config, state = GQA.build()
    tokens = random_tokens(config)
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 500.0}
    new = config | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    assert torch.equal(logits(state, old, tokens), logits(state, new, tokens))
    assert (
        relative_difference(
            logits(state, new, tokens), transformers_logits(tmp_path, new, state, tokens, torch.float64)
        )
        < 1e-5
    )
    assert relative_difference(logits(state, new, tokens), logits(state, config, tokens)) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
        {"hidden_act": "gelu"},
        {"sliding_window": 4},
    ],
)
def test_what_is_not_modelled_is_refused(change):
    config, state = GQA.build()
    with pytest.raises(ValueError, match="reference decoder"):
        logits(state, config | change, random_tokens(config))
