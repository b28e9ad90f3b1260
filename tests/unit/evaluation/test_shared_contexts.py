"""Tests of shared contexts: the scores of lm-eval's scorer and of every row alone."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from family_models import SIZES
from quantgrid.evaluation import harness
from quantgrid.evaluation.harness import Harness
from quantgrid.evaluation.shared_contexts import (
    LONGEST_ROW,
    batches,
    items_of,
    longest_span,
    rounds_tokens_alone,
    score,
)
from quantgrid.ground.places import ROOT
from quantgrid.inference.key_values import round_key_values
from quantgrid.inference.linear import Rounding
from quantgrid.machine.chunks import UNSHARED_TOKENS
from quantgrid.models.families import FAMILIES
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.schemes import activation_scheme
from quantgrid.schemes.cell_schemes import KeyValueScheme
from selection import others_slow

TINY = ROOT / "tests" / "data" / "tiny-llama"
VOCABULARY = SIZES["vocab_size"]
# joined linears, a softcap with a sliding window, a mixture of experts
EXAMPLES = ("Phi3ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM")


@pytest.fixture(scope="module")
def tiny():
    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(TINY)


def drawn(seed: int, contexts: int = 6, longest: int = 9) -> list[tuple[list[int], list[int]]]:
    """Requests of one to four continuations a context, in random order, some of them twice."""
    numbers = random.Random(seed)
    found = []
    for _ in range(contexts):
        context = [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, longest))]
        for _ in range(numbers.randint(1, 4)):
            found.append(
                (context, [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, 1 + longest // 2))])
            )
    found += found[:2]
    numbers.shuffle(found)
    return found


def alone(model: nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score of one request from the logits of its row."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].float()
    logits = logits[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    chosen = logits.log_softmax(-1)[torch.arange(len(target)), target]
    return chosen.sum().item(), bool((logits.argmax(-1) == target).all())


def shared(model: nn.Module, requests, size: int, max_length: int = 64) -> list[tuple[float, bool]]:
    found = {n: answer for batch in batches(items_of(requests, max_length), size) for n, *answer in score(model, batch)}
    return [tuple(found[number]) for number in range(len(requests))]


def same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]], tolerance: float = 1e-4) -> bool:
    return [greedy for _, greedy in found] == [greedy for _, greedy in wanted] and all(
        abs(one - other) < tolerance for (one, _), (other, _) in zip(found, wanted)
    )


# linear attention has no mask: its continuations have rows alone
SHARING = [name for name, family in FAMILIES.items() if not family.linear]


@pytest.mark.parametrize("architecture", others_slow(SHARING, EXAMPLES.__contains__))
def test_every_family_scores_as_in_a_row_alone(architecture, family_model):
    model = load_full_precision(family_model(architecture).folder)
    window = getattr(model.config, "sliding_window", None)
    requests = drawn(1, longest=min(9, window - 2 - window // 3) if window else 9)
    assert max(item.span for item in items_of(requests, 64)) <= longest_span(model.config)
    assert same(shared(model, requests, 3), [alone(model, *request) for request in requests])


def test_scores_do_not_depend_on_the_batch(tiny):
    requests = drawn(2)
    once = shared(tiny[0], requests, 1)
    for size in (2, 5, 100):
        assert same(shared(tiny[0], requests, size), once, 1e-5)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    again = shared(tiny[0], [requests[number] for number in order], 3)
    assert same(again, [once[number] for number in order], 1e-5)


def test_the_harness_gives_the_scores_of_lm_eval(tiny):
    """Texts with one and several choices, equal requests, and a context that loses its beginning."""
    model, tokenizer = tiny
    harnesses = [kind(pretrained=model, tokenizer=tokenizer, batch_size=3) for kind in (HFLM, Harness)]
    long = [[number % VOCABULARY for number in range(harnesses[0].max_length + 3)], [1, 2, 3]]
    requests = [((str(number), "x"), *request) for number, request in enumerate([*drawn(3), long, (long[0], [5, 6])])]
    wanted, found = (harness._loglikelihood_tokens(list(requests), disable_tqdm=True) for harness in harnesses)
    assert same(found, wanted)
    assert harnesses[1].truncated == 2


def test_a_context_is_in_one_row_and_equal_requests_are_scored_once():
    requests = [([1, 2], [3]), ([1, 2], [4, 5]), ([1, 2], [3]), ([2], [3])]
    first, second = items_of(requests, 10)
    assert (first.context, first.asked, first.length, first.span) == ((1, 2), {(3,): [0, 2], (4, 5): [1]}, 3, 3)
    assert (second.context, second.asked) == ((2,), {(3,): [3]})


def test_a_context_too_long_loses_its_beginning():
    assert [item.context for item in items_of([([1, 2, 3, 4], [5]), ([1, 2, 3, 4], [5, 6])], 3)] == [(2, 3, 4), (3, 4)]


@pytest.mark.parametrize(
    "overrides, fixed, accepted",
    [
        ({}, {}, True),
        ({"granularity": "tensor"}, {}, False),
        ({"granularity": "tensor"}, {"scale": torch.ones(1, 1)}, True),
        ({"scale_format": "e4m3", "group_size": 16, "global_scale": "tensor"}, {}, False),
        ({"scale_format": "e4m3", "group_size": 16, "global_scale": "static"}, {"global_scale": torch.ones(1)}, True),
    ],
)
def test_scales_over_all_tokens_are_left_to_rows_alone(tiny, overrides, fixed, accepted):
    model = LlamaForCausalLM(tiny[0].config)
    model.rounding = Rounding(activation_scheme("int4", **overrides), fixed)
    assert rounds_tokens_alone(model) == accepted


def test_positions_beyond_a_sliding_window_are_left_to_rows_alone(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    assert longest_span(model.config) == math.inf
    model.config.sliding_window = 8
    assert longest_span(model.config) == 8
    wanted, found = (
        kind(pretrained=model, tokenizer=tokenizer, batch_size=3)._loglikelihood_tokens(
            [((str(number), "x"), *request) for number, request in enumerate(drawn(6))], disable_tqdm=True
        )
        for kind in (HFLM, Harness)
    )
    assert same(found, wanted), "long and short ones in one call"
    model.config.use_sliding_window = False
    assert longest_span(model.config) == math.inf


def test_frequencies_chosen_by_the_longest_row_limit_the_span(tiny):
    config = copy.deepcopy(tiny[0].config)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    assert longest_span(config) == 32


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_batch_fills_a_number_of_tokens_with_its_padding(tiny, tokens):
    requests = drawn(2)
    found = list(batches(items_of(requests, 64), math.inf, tokens))
    assert all(len(batch) == 1 or len(batch) * batch[0].length <= tokens for batch in found)
    assert all(len(batch) == max(1, tokens // batch[0].length) for batch in found[:-1])
    scores = {number: answer for batch in found for number, *answer in score(tiny[0], batch)}
    assert same([tuple(scores[number]) for number in range(len(requests))], shared(tiny[0], requests, 1), 1e-5)


def test_long_requests_alone_are_also_batched_by_tokens(tiny, monkeypatch):
    """Those that share no row are lm-eval's own, with logits at every position."""
    monkeypatch.setattr(harness, "longest_span", lambda config: 0)
    requests = [(("", ""), *request) for request in drawn(2)]
    own = Harness(pretrained=tiny[0], tokenizer=tiny[1], tokens=64)
    wanted = [alone(tiny[0], *request) for _, *request in requests]
    assert same(own._loglikelihood_tokens(requests), wanted)
    assert own.batch_size == max(1, UNSHARED_TOKENS // max(len(a) + len(b) for _, a, b in requests))


def test_many_continuations_of_one_context_go_into_several_rows(tiny):
    """Answers without a query share one empty context, which is one token."""
    requests = [([1], [number % VOCABULARY, number // VOCABULARY, 3, 4, 5]) for number in range(600)]
    items = items_of([*requests, requests[0]], 512)
    assert len(items) == 3 and all(item.length <= LONGEST_ROW for item in items)
    asked = [number for item in items for numbers in item.asked.values() for number in numbers]
    assert sorted(asked) == list(range(601)) and items[0].asked[tuple(requests[0][1])] == [0, 600]
    sizes = [len(batch) for batch in batches(items * 20, 64)]
    assert sum(sizes) == 60 and max(sizes) <= 40
    few = requests[:40]
    assert same(shared(tiny[0], few, 8), [alone(tiny[0], *request) for request in few])


def test_one_token_takes_no_place_in_a_row():
    context = list(range(2 * LONGEST_ROW))
    [item] = items_of([(context, [number]) for number in range(4)], 4 * LONGEST_ROW)
    assert item.length == len(context)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rounded_inputs_keys_and_values_score_as_in_a_row_alone(tiny, attention):
    model = copy.deepcopy(tiny[0])
    model.set_attn_implementation(attention)
    round_key_values(model, KeyValueScheme(activation_scheme("int8"), rotate_keys=True))
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: (Rounding(activation_scheme("int8"), {})(given[0]),))
    requests = drawn(7)
    assert same(shared(model, requests, 3), [alone(model, *request) for request in requests], 2e-2)
    unrounded = [alone(tiny[0], *request) for request in requests]
    assert not same(shared(model, requests, 3), unrounded, 1e-4)


def test_no_requests_have_no_scores(tiny):
    assert Harness(pretrained=tiny[0], tokenizer=tiny[1], batch_size=2)._loglikelihood_tokens([]) == []
