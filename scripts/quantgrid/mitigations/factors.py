"""How the factors of a low-rank term are stored: bfloat16, or codes of 8 or 4 bits with one float32 scale per component of the term.

The left factor is rounded first; then the right one is solved for again, R = L⁺E, which is the best for the rounded left factor under
every metric |(E - L R) M|, and rounded. LQER (arXiv 2402.02446) and CALDERA (2405.18886) round their factors too, in other formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantizer import QuantizedTensor, QuantScheme, quantize

# Written out: a preset of the grid may be edited without a change of any key, and must not change what a job computes.
FACTORS: dict[str, QuantScheme | None] = {"bf16": None, "fp8": QuantScheme("e4m3"), "int8": QuantScheme("int8"), "int4": QuantScheme("int4")}


def stored_term(left: Tensor, right: Tensor, error: Tensor,
                factors: str) -> tuple[tuple[Tensor, Tensor], tuple[QuantizedTensor, QuantizedTensor] | None]:
    """((left, right) as they are computed with, (left transposed, right) as they are stored or None for bfloat16).

    ``left`` (*batch, m, r), ``right`` (*batch, r, n) for ``error`` (*batch, m, n), all float64; ``factors`` names the format.
    """
    wanted = FACTORS[factors]
    if wanted is None:
        return (left.to(torch.bfloat16), right.to(torch.bfloat16)), None
    transposed = quantize(left.mT.float().contiguous(), wanted)
    rounded = transposed.dequantize().mT
    refitted = quantize((torch.linalg.pinv(rounded.double()) @ error).float(), wanted)
    return (rounded.contiguous(), refitted.dequantize()), (transposed, refitted)
