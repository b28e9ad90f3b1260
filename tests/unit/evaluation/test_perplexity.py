"""Losses and divergences by their definition in float64, however the work is cut; means, errors and
differences as numpy and scipy have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from quantgrid.evaluation import perplexity as module
from quantgrid.evaluation.perplexity import evaluate, final_hidden, window_losses
from quantgrid.evaluation.significance import mean_and_error, paired_difference, perplexity, perplexity_difference
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.places import ROOT
from quantgrid.models.lm_head import Head, head_of
from quantgrid.quantization.checkpoints import load_full_precision
from reference_decoder import logits
from tiny_decoders import CASES, Case, random_tokens, save

TINY = ROOT / "tests" / "data" / "tiny-llama"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return load_full_precision(TINY)


@pytest.fixture(scope="module")
def other():
    """The tiny model with its weights disturbed."""
    changed = load_full_precision(TINY)
    with torch.no_grad():
        for seed, parameter in enumerate(changed.parameters()):
            parameter += 0.2 * parameter.std() * normal(*parameter.shape, seed=seed) if parameter.dim() > 1 else 0
    return changed


@pytest.fixture(scope="module")
def windows():
    return torch.randint(512, (5, 40), generator=torch.Generator().manual_seed(0))


def by_definition(of_model, tokens, reference=None):
    """(cross entropy, KL(p || q)) of one window in float64, from float64 logits of which the last
    predicts nothing."""
    logs = torch.log_softmax(of_model[:-1].double(), -1)
    loss = -logs[torch.arange(len(tokens) - 1), tokens[1:]].mean().item()
    if reference is None:
        return loss, None
    p = torch.softmax(reference[:-1].double(), -1)
    return loss, (p * (p.log() - logs)).sum(-1).mean().item()


def losses(hidden, head, tokens, reference=None):
    """:func:`window_losses` with lm_heads alone."""
    wanted = None if reference is None else (reference[0], Head(reference[1]))
    return window_losses(hidden, Head(head), tokens, wanted)


# -- one window ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 5, 256, 257, 258, 600])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_window_by_definition(length, scale):
    hidden, head, tokens = normal(length, 16), scale * normal(50, 16, seed=1), torch.randint(50, (length,))
    wanted_hidden, wanted_head = normal(length, 24, seed=2), scale * normal(50, 24, seed=3)
    wanted = by_definition(hidden @ head.T, tokens, wanted_hidden @ wanted_head.T)
    found = losses(hidden, head, tokens, (wanted_hidden, wanted_head))
    assert np.allclose(found, wanted, rtol=1e-5)
    assert losses(hidden, head, tokens) == (found[0], None)


def test_the_last_position_and_the_first_token_do_not_count():
    hidden, head, tokens = normal(9, 16), normal(50, 16, seed=1), torch.randint(50, (9,))
    changed, others = hidden.clone(), tokens.clone()
    changed[-1] += 5
    others[0] = (others[0] + 1) % 50
    assert (
        losses(changed, head, others, (hidden, head))
        == losses(hidden, head, tokens, (changed, head))
        == (losses(hidden, head, tokens)[0], 0.0)
    )


def test_divergence_is_of_full_precision_from_the_model():
    """KL(p || q) with p the reference; the other way round is another number."""
    p, q = normal(9, 16), 2 * normal(9, 16, seed=5)
    head, tokens = normal(50, 16, seed=1), torch.randint(50, (9,))
    (_, forth), (_, back) = losses(q, head, tokens, (p, head)), losses(p, head, tokens, (q, head))
    assert (
        math.isclose(forth, by_definition(q @ head.T, tokens, p @ head.T)[1], rel_tol=1e-5)
        and abs(forth - back) > 0.1 * forth
    )


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary():
    loss, divergence = losses(
        torch.zeros(30, 8), normal(50, 8), torch.randint(50, (30,)), (torch.zeros(30, 8), normal(50, 8))
    )
    assert math.isclose(loss, math.log(50), rel_tol=1e-6) and divergence == 0


@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 1000])
def test_the_chunk_does_not_matter(chunk, monkeypatch):
    hidden, head, tokens = normal(41, 16), normal(50, 16, seed=1), torch.randint(50, (41,))
    reference = (normal(41, 16, seed=2), head)
    whole = losses(hidden, head, tokens, reference)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert np.allclose(losses(hidden, head, tokens, reference), whole, rtol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(2, 40), st.floats(0.01, 30), st.integers(0, 2**31))
def test_losses_are_those_of_any_window(length, vocabulary, scale, seed):
    hidden, head = normal(length, 8, seed=seed), scale * normal(vocabulary, 8, seed=seed + 1)
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    reference = normal(length, 8, seed=seed + 2)
    loss, divergence = losses(hidden, head, tokens, (reference, head))
    assert np.allclose(
        (loss, divergence), by_definition(hidden @ head.T, tokens, reference @ head.T), rtol=1e-4, atol=1e-5 * scale
    )
    assert divergence > -1e-6 * scale


# -- a model ---------------------------------------------------------------------------------------


def evaluated(of_model, windows, full, batch_size=2):
    return evaluate(of_model, windows, final_hidden(full, windows, batch_size), lambda: head_of(full), batch_size)


@pytest.mark.parametrize("case", [case for case in CASES if case.heads == 9 and case.tied], ids=str)
def test_a_model_by_definition(case, tmp_path):
    """From the reference decoder's logits; the reference has another head, and another width, than
    the model."""
    found = {}
    for name, built in (("model", case), ("full", type(case)(**{**vars(case), "tied": False, "seed": 50}))):
        config, state = built.build(torch.float32)
        tokens = random_tokens(config, 3, 20)
        found[name] = (load_full_precision(save(tmp_path / name, config, state)), logits(state, config, tokens))
    result = evaluated(found["model"][0], tokens, found["full"][0])
    wanted = [by_definition(q, window, p) for q, p, window in zip(found["model"][1], found["full"][1], tokens)]
    assert np.allclose(list(zip(result["negative_log_likelihood"], result["kl_divergence"])), wanted, rtol=1e-4)


def test_the_losses_are_those_of_transformers(model, other, windows):
    found = evaluated(other, windows, model)
    with torch.no_grad():
        wanted = [other(window[None], labels=window[None]).loss.item() for window in windows]
    assert np.allclose(found["negative_log_likelihood"], wanted, rtol=1e-5) and len(found["kl_divergence"]) == len(
        windows
    )


def test_the_divergence_from_itself_is_zero(model, windows):
    assert evaluated(model, windows, model)["kl_divergence"] == [0.0] * len(windows)


def test_the_divergence_of_another_model_is_positive(model, other, windows):
    assert min(evaluated(other, windows, model)["kl_divergence"]) > 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 5, 50])
def test_the_batch_does_not_matter(batch_size, model, other, windows):
    one, several = evaluated(other, windows, model, 2), evaluated(other, windows, model, batch_size)
    assert all(np.allclose(one[name], several[name], rtol=1e-4) for name in one)
    assert np.allclose(final_hidden(model, windows, 2), final_hidden(model, windows, batch_size), atol=1e-4)


def test_windows_keep_their_order(model, other, windows):
    forward, backward = evaluated(other, windows, model), evaluated(other, windows.flip(0), model)
    assert all(np.allclose(forward[name], backward[name][::-1], rtol=1e-4) for name in forward)
    assert len(set(forward["negative_log_likelihood"])) == len(windows)


def test_batches_are_shown_as_progress(model, windows):
    seen = []
    progress = lambda batches: seen.append(len(batches)) or batches  # noqa: E731
    evaluate(model, windows, final_hidden(model, windows, 2, progress), lambda: head_of(model), 2, progress)
    assert seen == [3, 3]


def test_the_other_head_is_asked_for_behind_the_last_layer(model, windows):
    """A layer and two heads are never in memory together."""
    events = []

    def progress(layers):
        yield from layers
        events.append("layers are through")

    evaluate(
        model,
        windows,
        final_hidden(model, windows, 2),
        lambda: events.append("head") or head_of(model),
        2,
        progress,
    )
    assert events == ["layers are through", "head"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_model_that_broke_down_fails_the_cell(where, value, model, windows):
    broken = load_full_precision(TINY)
    reference = final_hidden(model, windows, 2)
    with torch.no_grad():
        dict(broken.named_parameters(remove_duplicate=False))[where].view(-1)[5] = value
    with pytest.raises(NumericalFailure, match="the loss of window 0 is NaN or infinite"):
        evaluate(broken, windows, reference, lambda: head_of(model), 2)


def test_the_failure_names_its_window(model, windows):
    broken, rare = load_full_precision(TINY), int(windows[3, 20])
    assert all(rare not in windows[other] for other in (0, 1, 2))
    with torch.no_grad():
        broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
        broken.model.embed_tokens.weight[rare] = math.nan
    with pytest.raises(NumericalFailure, match="window 3 "):
        evaluate(broken, windows, final_hidden(model, windows, 2), lambda: head_of(model), 2)


def test_a_broken_reference_fails_the_cell(model, windows):
    reference = final_hidden(model, windows, 2)
    reference[1, 4, 3] = math.nan
    with pytest.raises(NumericalFailure, match="window 1 "):
        evaluate(model, windows, reference, lambda: head_of(model), 2)


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_for_a_chunk_of_positions_at_a_time(dtype, tmp_path):
    """The largest allocation is a chunk's logits in float32, whatever the batch: of all windows of
    a batch they would be eight times as large."""
    config, state = Case("LlamaForCausalLM", vocab=4096).build(torch.float32)
    of_model, tokens = (
        load_full_precision(save(tmp_path / "model", config, state), dtype),
        random_tokens(config, 4, 512),
    )
    reference = final_hidden(of_model, tokens, 4)
    with Largest() as seen:
        evaluate(of_model, tokens, reference, lambda: head_of(of_model), 4)
    assert seen.size == module.CHUNK * 4096 * torch.float32.itemsize


# -- significance ----------------------------------------------------------------------------------

LOSSES = np.random.default_rng(0).normal(3.0, 0.4, 16).tolist()
WORSE = (np.array(LOSSES) + np.random.default_rng(1).normal(0.05, 0.02, 16)).tolist()


def test_mean_and_error_are_those_of_scipy():
    assert np.allclose(mean_and_error(LOSSES), (np.mean(LOSSES), stats.sem(LOSSES)), rtol=1e-12)
    assert np.allclose(mean_and_error([1e9 + x for x in LOSSES]), (1e9 + np.mean(LOSSES), stats.sem(LOSSES)), rtol=1e-6)
    assert mean_and_error([2.5]) == (2.5, None) and mean_and_error([2.0, 2.0, 2.0]) == (2.0, 0.0)


def test_perplexity_is_the_exponential_of_the_mean():
    value, error = perplexity(LOSSES)
    assert math.isclose(value, stats.gmean(np.exp(LOSSES)), rel_tol=1e-12) and math.isclose(
        error, value * stats.sem(LOSSES), rel_tol=1e-12
    )
    assert perplexity([math.log(7)]) == (pytest.approx(7), None)


def test_the_error_of_a_perplexity_is_that_of_repeated_draws():
    draws = np.random.default_rng(2).normal(3.0, 0.4, (4000, 64))
    errors = [perplexity(row)[1] for row in draws[:200]]
    assert math.isclose(np.mean(errors), np.exp(draws.mean(1)).std(), rel_tol=0.05)


def test_an_enormous_loss_is_a_finite_perplexity():
    value, error = perplexity([900.0, 1000.0])
    assert math.isfinite(value) and value > 1e300 and error > 0


def test_paired_difference_is_the_paired_t_test():
    difference, error = paired_difference(WORSE, LOSSES)
    wanted = stats.ttest_rel(WORSE, LOSSES)
    assert math.isclose(difference / error, wanted.statistic, rel_tol=1e-9)
    assert math.isclose(difference, np.mean(WORSE) - np.mean(LOSSES), rel_tol=1e-9)
    assert error < 0.2 * math.hypot(stats.sem(WORSE), stats.sem(LOSSES)), "pairing is what makes it small"
    with pytest.raises(ValueError, match="shorter|longer"):
        paired_difference(LOSSES, LOSSES[:-1])


def test_perplexity_difference_linearizes_and_keeps_the_pairing():
    value, error = perplexity_difference(WORSE, LOSSES)
    assert math.isclose(value, math.exp(np.mean(WORSE)) - math.exp(np.mean(LOSSES)), rel_tol=1e-12)
    gradient = np.array([math.exp(np.mean(WORSE)), -math.exp(np.mean(LOSSES))])
    assert math.isclose(error, math.sqrt(gradient @ np.cov(WORSE, LOSSES) @ gradient / len(LOSSES)), rel_tol=1e-9)
    assert perplexity_difference(LOSSES, LOSSES) == (0.0, 0.0) and perplexity_difference([3.0], [2.0])[1] is None
    assert perplexity_difference(LOSSES, WORSE) == (-value, pytest.approx(error))


def test_the_order_of_windows_changes_nothing():
    order = np.random.default_rng(3).permutation(16)
    losses, worse = np.array(LOSSES)[order].tolist(), np.array(WORSE)[order].tolist()
    assert np.allclose(perplexity(worse), perplexity(WORSE), rtol=1e-12)
    assert np.allclose(perplexity_difference(worse, losses), perplexity_difference(WORSE, LOSSES), rtol=1e-9)
    assert not np.allclose(
        perplexity_difference(worse, LOSSES)[1], perplexity_difference(WORSE, LOSSES)[1], rtol=0.5
    ), "but pairs stay pairs"
