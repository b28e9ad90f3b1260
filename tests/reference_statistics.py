"""Statistics of a site by their definition, in float64: the oracle that calibration and the closed
forms are checked against.

Also the inputs of a decoder whose transform leaves operations online, and statistics written as
calibration writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantgrid.calibration.accumulators import site_name
from quantgrid.calibration.statistics import SiteStatistics, to_tensors
from quantgrid.ground.storage import write_tensors
from quantgrid.linalg.hadamard import hadamard_matrix
from reference_decoder import logits

FIELDS = ("mean", "second_moment", "mean_absolute", "minimum", "maximum")


def statistics_of(x: Tensor, samples: Tensor | None = None) -> SiteStatistics:
    """Statistics of tokens ``x`` (tokens, n); all of them are the sample where none is given."""
    x = x.double()
    return SiteStatistics(
        len(x), x.mean(0), x.T @ x / len(x), x.abs().mean(0), x.amin(0), x.amax(0), x if samples is None else samples
    )


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    """Check whether two tensors differ by at most ``tolerance`` of the largest magnitude."""
    return ours.shape == theirs.shape and (ours - theirs).abs().max().item() <= tolerance * max(
        theirs.abs().max().item(), 1e-300
    )


def apply_online(operations: list[dict], x: Tensor) -> Tensor:
    """Online operations by dense matrices."""
    for operation in operations:
        name, given = operation["operation"], {key: value for key, value in operation.items() if key != "operation"}
        x = x - given.pop("shift").to(x) if name == "subtract" else x @ _dense(name, x.shape[-1], given).to(x)
        assert not given, (name, given)
    return x


def _dense(name: str, n: int, given: dict) -> Tensor:
    """The matrix T of an operation x -> x T on n channels; takes what it uses out of ``given``."""
    if name == "gather":
        return torch.eye(n, dtype=torch.float64)[:, given.pop("order").long()]
    if name == "multiply":
        return torch.diag(given.pop("factor").double())
    if name == "signed_hadamard":
        return torch.diag(given.pop("signs").double()) @ hadamard_matrix(n) / n**0.5
    if name == "head_rotate":
        matrix = given.pop("matrix").double()
        return torch.kron(matrix.contiguous(), torch.eye(n // len(matrix), dtype=torch.float64))
    if name == "block_rotate":
        blocks = given.pop("blocks").double()
        return torch.block_diag(*blocks.repeat(n // blocks[..., 0].numel(), 1, 1))
    if name == "kronecker":
        left = given.pop("left").double()
        return torch.kron(left, given.pop("right", torch.eye(n // len(left))).double())
    order = {
        "hadamard": lambda: n,
        "block_hadamard": lambda: given.pop("size"),
        "head_hadamard": lambda: given.pop("heads"),
    }[name]()
    matrix, rest = hadamard_matrix(order) / order**0.5, torch.eye(n // order, dtype=torch.float64)
    return torch.kron(matrix, rest) if name == "head_hadamard" else torch.kron(rest, matrix)


def run(
    state: dict[str, Tensor], config: dict, tokens: Tensor, online: Mapping[tuple[int, str], list[dict]]
) -> tuple[Tensor, dict]:
    """(logits, (layer, site) -> (tokens, n)) in float64: a decoder with online operations, and what
    its linears read after them."""
    seen: dict[tuple[int, str], Tensor] = {}

    def hook(layer: int, site: str, x: Tensor) -> Tensor:
        x = apply_online(online.get((layer, site), []), x)
        seen[layer, site] = x.flatten(0, 1)
        return x

    return logits(state, config, tokens, hook), seen


def write_statistics(path: str | Path, inputs: Mapping[tuple[int, str], Tensor]) -> Path:
    """A calibration file of the tokens ``inputs`` (layer, site) -> (tokens, n)."""
    tensors: dict[str, Tensor] = {}
    for (layer, site), x in inputs.items():
        tensors |= to_tensors(site_name(layer, site), statistics_of(x))
    write_tensors(path, tensors)
    return Path(path)
