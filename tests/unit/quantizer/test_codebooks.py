"""k-means codebooks: the algorithm against scikit-learn's, what they gain, and that a block's
codebook is its own."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from quantgrid.ground.errors import ConfigError
from quantgrid.quantizer import fake_quantize, find_parameters, quantize
from quantgrid.quantizer.codebooks import _lloyd, fit_codebooks
from quantgrid.quantizer.rounding import round_values
from quantgrid.schemes import scheme

WEIGHT = (
    torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 0.1, 1, 7, 300, 1e5])[:, None]
)


def squared_error(x, values):
    return (x - values).double().square().sum(-1)


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_lloyd_ends_where_that_of_scikit_learn_does(entries):
    values = torch.randn(1, 1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sort(dim=-1).values
    start = values[..., :: 500 // entries][..., :entries].contiguous()
    sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    oracle = KMeans(entries, init=start[0, 0, :, None].numpy(), n_init=1, tol=0, max_iter=1000).fit(
        values[0, 0, :, None].numpy()
    )
    np.testing.assert_allclose(
        _lloyd(values, sums, start)[0, 0].numpy(), np.sort(oracle.cluster_centers_[:, 0]), rtol=1e-9
    )


def test_a_small_codebook_is_nearly_the_best_of_all_partitions():
    values = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).sort().values
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in torch.tensor_split(values, cuts))
        for cuts in itertools.combinations(range(1, 20), 3)
    )
    book = fit_codebooks(values.float()[None, None], 4, seed=0)[0, 0].double()
    found = float((values[:, None] - book).square().amin(-1).sum())
    assert best <= found * (1 + 1e-6) and found <= 1.1 * best


@pytest.mark.parametrize("bits, fixed", [(4, "nf4"), (4, "int4"), (4, "fp4"), (3, "int3"), (2, "int2")])
def test_a_fitted_codebook_beats_a_fixed_one(bits, fixed):
    assert (
        squared_error(WEIGHT, fake_quantize(WEIGHT, scheme(f"kmeans{bits}")))
        < squared_error(WEIGHT, fake_quantize(WEIGHT, scheme(fixed)))
    ).all()


def test_values_that_an_entry_holds_are_kept():
    x = torch.tensor([[-3.0, 0.0, 0.5, 2.0] * 8, [-1.0, -0.75, 0.25, 1.0] * 8])
    assert torch.equal(fake_quantize(x, scheme("kmeans2", scale_format="e8m0")), x)


def test_the_seed_decides_and_blocks_do_not_share():
    first, second = (find_parameters(WEIGHT, scheme("kmeans4", seed=seed)).codebook for seed in (0, 1))
    assert torch.equal(first, find_parameters(WEIGHT, scheme("kmeans4")).codebook) and not torch.equal(first, second)
    assert torch.equal(first[2:3], find_parameters(WEIGHT[2:3], scheme("kmeans4")).codebook)


def test_codebooks_are_ascending_float16_and_counted():
    quantized = quantize(WEIGHT, scheme("kmeans4", group_size=64))
    assert quantized.codebook.shape == (6, 4, 16) and quantized.codebook.dtype == torch.float16
    assert (quantized.codebook.diff(dim=-1) >= 0).all() and quantized.codebook.abs().max() <= 1
    assert quantized.bits() == 4 + (32 + 16 * 16) / 64
    assert quantize(torch.randn(4, 1024), scheme("kmeans4")).bits() == 4 + (32 + 256) / 1024


def test_more_entries_than_values():
    x = torch.randn(3, 8)
    assert (fake_quantize(x, scheme("kmeans4")) - x).abs().max() < 1e-2


def test_rounding_without_the_codebook_is_refused():
    with pytest.raises(ConfigError, match="pass the codebook of the tensor's parameters"):
        round_values(torch.ones(2, 4), torch.ones(2, 1), None, scheme("kmeans4"))
