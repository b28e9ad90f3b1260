"""Choice between two scales per block (``range: four_six``): Four Over Six (arXiv 2512.02010).

One scale makes the largest element of the block 6, the other one, 1.5 times as large, makes it 4. The
second is taken where its sum of squared errors is smaller. Both are tried at once, so that a tensor takes
few calls more than under one scale, and the values of the better one are rounded already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemes.quant_scheme import QuantScheme
from .ranges import chunk_elements, row_slices
from .rounding import compute_dtype, round_values_
from .scales import effective_step, range_parameters

_LARGER = 1.5  # factor of the range under which the largest element becomes 4


def choose_scales(values: Tensor, high: Tensor, scheme: QuantScheme, global_scale: Tensor,
                  rounded: Tensor | None = None) -> Tensor:  # fmt: skip
    """Stored scales (rows, groups) of the smaller squared error in every block; ties go to 6.

    ``values`` is (rows, groups, size); ``high`` (rows, groups) the largest magnitudes, float32;
    ``global_scale`` (rows, 1) is fixed. The rounded values go into ``rounded``, contiguous and as large as ``values``.
    """
    found = []
    for rows in row_slices(values):
        x, top = values[rows].to(compute_dtype(values.dtype)), high[rows]
        both = range_parameters(None, torch.stack([top, top * _LARGER]), scheme, global_scale[rows])
        tried = round_values_(x, effective_step(both, scheme).unsqueeze(-1), None, scheme)
        six, four = _errors(tried, x, top)
        # numbers of the blocks in ``tried``, which holds those of 6 before those of 4
        chosen = torch.arange(six.numel(), dtype=torch.int32, device=x.device)
        chosen.add_((four < six).flatten(), alpha=six.numel())
        bytes_of_scales = both.scale.view(torch.uint8).flatten()
        found.append(bytes_of_scales.index_select(0, chosen).view(both.scale.dtype).view_as(top))
        if rounded is not None:
            rounded.view(values.shape)[rows] = tried.flatten(0, 2).index_select(0, chosen).view_as(x)
    return torch.cat(found)


def _errors(tried: Tensor, values: Tensor, top: Tensor) -> Tensor:
    """Squared errors (2, rows, groups) of the blocks of ``tried`` (2, rows, groups, size), float32, in units of
    the largest magnitudes ``top``; NaN in a block of zeros."""
    errors = (tried - values).mul_(top.reciprocal().to(values.dtype).unsqueeze(-1)).square_()
    return sum(piece.sum(-1).float() for piece in errors.split(chunk_elements(values), dim=-1))
