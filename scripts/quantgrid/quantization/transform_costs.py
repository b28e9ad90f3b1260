"""Costs of a transform: online operations per token, added parameters and bits.

Bits count what a deployment stores in addition to the linears, in the precision of the checkpoint:
matrices, factors and shifts of online operations and new biases in float32, channel orders in
int32, fixed activation ranges in float32. A Hadamard transform costs operations and no bits.
Embedding and lm_head are in no count of bits per weight; ``untied_parameters`` counts a new
lm_head.
"""

from __future__ import annotations

from ..calibration.accumulators import site_name
from ..calibration.layers import DecoderFolder
from ..inference.online import arithmetic, restored
from ..models.counts import all_weights
from ..models.plans import END_ROLES
from .checkpoints import CheckpointContent


def transform_costs(content: CheckpointContent, decoder: DecoderFolder) -> dict[str, float]:
    """Costs by name.

    ``online_operations``: additions and multiplications per token, summed over layers.
    ``added_parameters``: parameters of online operations and of new biases.
    ``added_bits``: per weight of all linears, for these parameters and fixed ranges.
    ``untied_parameters``: of a lm_head that was tied to the embedding.
    """
    head = END_ROLES["lm_head"]
    added = [name for name in content.tensors if not decoder.holds(name)]
    beside = [content.tensors[name] for name in added if name != head and not _of_linear(name, content)]
    parameters = sum(content.tensors[name].numel() for name in added if name.endswith(".bias") or ".online." in name)
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in beside)
    return {
        "online_operations": online_operations(content, decoder),
        "added_parameters": parameters,
        "added_bits": bits / all_weights(decoder.shape),
        "untied_parameters": content.tensors[head].numel() if head in added else 0,
    }


def _of_linear(name: str, content: CheckpointContent) -> bool:
    """Check whether the bits of a linear include the tensor: codes, parameters, factors,
    outliers, residual columns."""
    return name.rpartition(".")[0].partition(".residual.")[0] in content.linears and not name.endswith(".bias")


def online_operations(content: CheckpointContent, decoder: DecoderFolder) -> int:
    """Additions and multiplications per token of all layers.

    Counts the operations of the sites, those of experts for the share of them that a token reaches,
    and R3 on queries and keys of a format with ``rotate_keys``.
    """
    shape, found = decoder.shape, 0
    for layer in range(shape.layers):
        plan = shape.plan(layer)
        for site in plan.sites:
            name = site_name(layer, site)
            operations = restored(name, content.online.get(name, []), content.tensors)
            share = shape.active_experts / shape.experts if site in plan.expert_sites else 1
            found += share * sum(arithmetic(operation, shape.site_size(site)) for operation in operations)
    if content.schemes.key_value and content.schemes.key_value.rotate_keys:
        caching = shape.layers - len(shape.linear_layers)
        found += caching * (shape.heads + shape.kv_heads) * arithmetic({"operation": "hadamard"}, shape.key_dim)
    return round(found)
