"""Leading singular vectors of a matrix: exact from the smaller Gram matrix, beyond a size from a random block Krylov space with a check.

The space is that of A Omega, A Aᵀ A Omega, ... (block Krylov iteration, arXiv 1504.05477), Omega Gaussian. Error matrices have nearly flat
spectra, on which plain subspace iteration is slow; a Krylov space settles their singular values within a few products.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ..errors import NumericalFailure

EXACT_UP_TO = 4096  # smaller dimension up to which the exact way is taken; beyond, it is the slower one
OVERSAMPLING = 2  # columns of the random block, times the rank
LARGEST_BLOCKS = 16  # powers after which the random way is given up
ACCURACY = 1e-3  # of the singular value number rank, relative
NOTHING = 1e-6  # of the largest singular value: what is below needs no accuracy
ROUNDING = 1e-13  # of the length of a column in float64: what is below is not told from rounding errors


def leading_directions(matrix: Tensor, rank: int, record: dict[str, str] | None = None) -> Tensor:
    """The ``rank`` leading left singular vectors (m, rank) of ``matrix`` (m, n); ``record['svd']`` says how a large one was solved."""
    if min(matrix.shape) > EXACT_UP_TO and 8 * OVERSAMPLING * rank <= min(matrix.shape):
        vectors, blocks = krylov_directions(matrix, rank)
        if record is not None:
            record["svd"] = f"randomized, {blocks} blocks" if vectors is not None else f"exact: {blocks} random blocks did not settle it"
        if vectors is not None:
            return vectors
    tall = matrix.shape[-2] > matrix.shape[-1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    try:
        vectors = _top_eigenvectors(gram, rank)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
        raise NumericalFailure(f"low-rank: the singular vectors of the error cannot be found ({error})") from None
    return torch.linalg.qr(matrix @ vectors).Q if tall else vectors


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors (n, rank) of a symmetric (n, n): a third of the time where LAPACK finds no others."""
    if gram.is_cuda:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    wanted = [len(gram) - rank, len(gram) - 1]
    return torch.from_numpy(scipy.linalg.eigh(gram.numpy(), subset_by_index=wanted, driver="evr")[1]).flip(-1)


def krylov_directions(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor | None, int]:
    """(vectors (m, rank), blocks used) of ``matrix`` (m, n) float64; None where the singular value number ``rank`` did not settle.

    Values from a growing space only grow, towards the true ones. Blocks are added until the last one moved the value number ``rank`` by
    less than a tenth of ``ACCURACY``, twice in a row.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], OVERSAMPLING * rank, generator=generator, dtype=matrix.dtype).to(matrix.device)
    block = _added(matrix.new_empty(len(matrix), 0), matrix @ start)
    basis, images = block, matrix.mT @ block
    gram, last, settled = images.mT @ images, 0.0, 0
    for blocks in range(1, LARGEST_BLOCKS + 1):
        if basis.shape[1] < rank:  # all that the matrix reaches: any directions complete it, their singular values are 0
            return torch.cat([basis, _added(basis, torch.randn(len(matrix), rank - basis.shape[1], generator=generator, dtype=matrix.dtype)
                                            .to(matrix.device))], 1), blocks
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        value, largest = values[-rank].item(), values[-1].item()
        settled = settled + 1 if value - last <= 0.1 * ACCURACY * max(value, NOTHING * largest) else 0
        block = _added(basis, matrix @ images[:, -block.shape[1]:])
        if settled == 2 or block.shape[1] == 0:
            return basis @ torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1), blocks
        last, image = value, matrix.mT @ block
        beside = images.mT @ image
        gram = torch.cat([torch.cat([gram, beside], 1), torch.cat([beside.mT, image.mT @ image], 1)])
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
    return None, LARGEST_BLOCKS


def _added(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns (m, k') of what ``block`` (m, k) adds to the orthonormal ``basis`` (m, b), less what is but rounding errors."""
    least = ROUNDING * torch.linalg.vector_norm(block, dim=0).max()
    block, factor = torch.linalg.qr(block - basis @ (basis.mT @ block))
    block = block[:, factor.diagonal().abs() > least]
    return torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
