"""What a transform costs while the model runs: arithmetic of its online operations per token, and parameters that the model did not have."""

from __future__ import annotations

from .architecture import END_ROLES, SITES
from .calibration import site_name
from .checkpoints import CheckpointContent
from .decoders import DecoderFolder
from .online import arithmetic, restored


def transform_costs(content: CheckpointContent, decoder: DecoderFolder) -> dict[str, int]:
    """``online_operations``: additions and multiplications per token, all layers together. ``added_parameters``: of the online operations and of
    biases that the model did not have. ``untied_parameters``: of a lm_head that was tied to the embedding."""
    arithmetics = 0
    for layer in range(decoder.shape.layers):
        for site in SITES:
            name = site_name(layer, site)
            operations = restored(name, content.online.get(name, []), content.tensors)
            arithmetics += sum(arithmetic(operation, decoder.shape.site_size(site)) for operation in operations)
    added = [name for name in content.tensors if name not in decoder.files]
    beside = sum(content.tensors[name].numel() for name in added if name.endswith(".bias") or ".online." in name)
    head = END_ROLES["lm_head"]
    untied = content.tensors[head].numel() if head in added else 0
    return {"online_operations": arithmetics, "added_parameters": beside, "untied_parameters": untied}
