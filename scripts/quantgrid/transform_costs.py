"""Costs of a transform: operations per token of what runs online, parameters and bits that it adds to the model.

Bits count what a deployment has to store besides the linears, in the precision in which the checkpoint keeps it:
matrices, factors and shifts of online operations and new biases in float32, orders of channels in int32, fixed ranges
of activations in float32. A Hadamard transform has operations and no bits. Neither embedding nor lm_head is in any
count of bits per weight; ``untied_parameters`` says where a head is new.
"""

from __future__ import annotations

from .architecture import END_ROLES, SITES, layer_weights
from .calibration import site_name
from .checkpoints import CheckpointContent
from .decoders import DecoderFolder
from .online import arithmetic, restored


def transform_costs(content: CheckpointContent, decoder: DecoderFolder) -> dict[str, float]:
    """Costs by name.

    ``online_operations``: additions and multiplications per token, all layers together. ``added_parameters``: of the
    online operations and of biases that the model did not have. ``added_bits``: per weight of all linears, of these
    and of fixed ranges. ``untied_parameters``: of a lm_head that was tied to the embedding.
    """
    head = END_ROLES["lm_head"]
    added = [name for name in content.tensors if name not in decoder.files]
    beside = [content.tensors[name] for name in added if name != head and not _of_linear(name, content)]
    parameters = sum(content.tensors[name].numel() for name in added if name.endswith(".bias") or ".online." in name)
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in beside)
    return {"online_operations": online_operations(content, decoder), "added_parameters": parameters,
            "added_bits": bits / (decoder.shape.layers * layer_weights(decoder.shape)),
            "untied_parameters": content.tensors[head].numel() if head in added else 0}


def _of_linear(name: str, content: CheckpointContent) -> bool:
    """Whether the bits of a linear count the tensor: its codes, their parameters, low-rank factors and outliers."""
    return name.rpartition(".")[0] in content.linears and not name.endswith(".bias")


def online_operations(content: CheckpointContent, decoder: DecoderFolder) -> int:
    """Additions and multiplications per token of all layers: operations of the sites, and R3 on queries and keys of a
    format with ``rotate_keys``."""
    shape, found = decoder.shape, 0
    for layer in range(shape.layers):
        for site in SITES:
            name = site_name(layer, site)
            operations = restored(name, content.online.get(name, []), content.tensors)
            found += sum(arithmetic(operation, shape.site_size(site)) for operation in operations)
    if content.schemes.key_value and content.schemes.key_value.rotate_keys:
        found += shape.layers * (shape.heads + shape.kv_heads) * arithmetic({"operation": "hadamard"}, shape.head_dim)
    return found
