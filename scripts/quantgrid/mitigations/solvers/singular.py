"""Leading singular vectors of a matrix, exact or by randomized block Krylov iteration.

Small matrices are solved from the smaller Gram matrix, large ones in the space of A Omega, A Aᵀ A
Omega, ... (block Krylov iteration, arXiv 1504.05477), Omega Gaussian, with a convergence check.
Error matrices have nearly flat spectra, on which plain subspace iteration converges slowly; a
Krylov space converges within a few products.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ...ground.errors import NumericalFailure

# smaller dimension up to which the exact solver is used; it is the slower one beyond
EXACT_UP_TO = 4096
OVERSAMPLING = 2  # columns of the random block, times the rank
LARGEST_BLOCKS = 16  # powers after which the randomized solver is abandoned
ACCURACY = 1e-3  # relative, of singular value number ``rank``
NOTHING = 1e-6  # relative to the largest singular value: smaller ones need no accuracy
# relative to the norm of a column: anything smaller is rounding error
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}


def leading_directions(matrix: Tensor, rank: int, record: dict[str, str] | None = None) -> Tensor:
    """The ``rank`` leading left singular vectors (m, rank) of ``matrix`` (m, n), in its dtype.

    ``record['svd']`` names the solver of a large matrix.
    """
    if min(matrix.shape) > EXACT_UP_TO and 8 * OVERSAMPLING * rank <= min(matrix.shape):
        vectors, blocks = krylov_directions(matrix, rank)
        if record is not None:
            record["svd"] = (
                f"randomized, {blocks} blocks"
                if vectors is not None
                else f"exact: {blocks} random blocks did not settle it"
            )
        if vectors is not None:
            return vectors
    tall = matrix.shape[-2] > matrix.shape[-1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    try:
        vectors = _top_eigenvectors(gram, rank)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
        raise NumericalFailure(f"low-rank: the singular vectors of the error could not be computed ({error})") from None
    return torch.linalg.qr(matrix @ vectors).Q if tall else vectors


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors (n, rank) of a symmetric (n, n).

    LAPACK takes a third of the time when it computes only these.
    """
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    wanted = [len(gram) - rank, len(gram) - 1]
    return torch.from_numpy(scipy.linalg.eigh(gram.numpy(), subset_by_index=wanted, driver="evr")[1]).flip(-1)


def krylov_directions(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor | None, int]:
    """(vectors (m, rank), blocks used) of ``matrix`` (m, n); None if not converged.

    Singular values from a growing space increase towards the true ones. Blocks are added until
    singular value number ``rank`` has changed by less than a tenth of ``ACCURACY`` twice in a row.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], OVERSAMPLING * rank, generator=generator, dtype=matrix.dtype).to(matrix.device)
    block = _added(matrix.new_empty(len(matrix), 0), matrix @ start)
    basis, images = block, matrix.mT @ block
    gram, last, settled = images.mT @ images, 0.0, 0
    for blocks in range(1, LARGEST_BLOCKS + 1):
        # the space is exhausted: any directions complete it, with singular value 0
        if basis.shape[1] < rank:
            return torch.cat(
                [
                    basis,
                    _added(
                        basis,
                        torch.randn(len(matrix), rank - basis.shape[1], generator=generator, dtype=matrix.dtype).to(
                            matrix.device
                        ),
                    ),
                ],
                1,
            ), blocks
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        value, largest = values[-rank].item(), values[-1].item()
        settled = settled + 1 if value - last <= 0.1 * ACCURACY * max(value, NOTHING * largest) else 0
        block = _added(basis, matrix @ images[:, -block.shape[1] :])
        if settled == 2 or block.shape[1] == 0:
            return basis @ torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1), blocks
        last, image = value, matrix.mT @ block
        beside = images.mT @ image
        gram = torch.cat([torch.cat([gram, beside], 1), torch.cat([beside.mT, image.mT @ image], 1)])
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
    return None, LARGEST_BLOCKS


def deviation(matrix: Tensor, vectors: Tensor) -> float:
    """Error of left singular vectors ``vectors`` (m, r) of ``matrix`` (m, n): the larger of their distance
    from orthonormal ones, and of the share of A Aᵀ V outside of their space."""
    images = matrix @ (matrix.mT @ vectors)
    outside = torch.linalg.norm(images - vectors @ (vectors.mT @ images))
    size = torch.linalg.norm(images)
    angles = vectors.mT @ vectors - torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    return max((outside / size).item() if size > 0 else 0.0, angles.abs().max().item())


def _added(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns (m, k') that ``block`` (m, k) adds to the orthonormal ``basis`` (m, b).

    Directions at the level of rounding errors are dropped.
    """
    least = ROUNDING[block.dtype] * torch.linalg.vector_norm(block, dim=0).max()
    block, factor = torch.linalg.qr(block - basis @ (basis.mT @ block))
    block = block[:, factor.diagonal().abs() > least]
    return torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
