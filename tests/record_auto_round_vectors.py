"""Record what AutoRound makes of one weight under fixed offsets and range factors, as
``tests/data/auto-round-vectors.safetensors``.

In a separate environment, with torch and transformers (the tests do not need the package):

    pip install --no-deps auto-round==0.16.0 py-cpuinfo==9.0.0
    PYTHONPATH=scripts python tests/record_auto_round_vectors.py

Its ``quant_tensor_sym`` gets our scale of a row, the largest magnitude over 7, as ``init_scale``; without
one it divides the largest weight, with its sign, by -8.
"""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round.data_type.int import quant_tensor_sym
from auto_round.data_type.mxfp import quant_mx
from auto_round.data_type.nvfp import nv_fp4
from safetensors.torch import save_file

TARGET = Path(__file__).parent / "data" / "auto-round-vectors.safetensors"
SHAPE = (6, 64)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * torch.randn(SHAPE, generator=generator).exp()
    offset = torch.rand(SHAPE, generator=generator) - 0.5
    rows, blocks = (1 - span * torch.rand(SHAPE[0], n, generator=generator) for n, span in ((1, 0.1), (4, 0.4)))
    calls = {
        "int4": lambda v: quant_tensor_sym(
            weight,
            bits=4,
            group_size=-1,
            v=v,
            init_scale=weight.abs().amax(-1, keepdim=True) / 7,
            max_scale=rows.flatten(),
            scale_dtype=torch.float32,
        ),
        "nvfp4": lambda v: nv_fp4(weight, group_size=16, v=v.reshape(-1, 16), max_scale=blocks),
        "mxfp4": lambda v: quant_mx(weight, bits=4, group_size=32, v=v.reshape(-1, 32)),
    }
    found = {"weight": weight, "offset": offset, "int4.factor": rows, "nvfp4.factor": blocks}
    for name, call in calls.items():
        v = offset.clone().requires_grad_()
        values, scale, _ = call(v)
        values.sum().backward()
        found[f"{name}.values"], found[f"{name}.gradient"] = values.detach(), v.grad
        found[f"{name}.scale"] = scale.detach().reshape(SHAPE[0], -1).contiguous()
    save_file(found, TARGET)


if __name__ == "__main__":
    main()
