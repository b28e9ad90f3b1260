"""quantgrid: 4-bit recipes of language models, taken apart and measured under the same conditions.

The public surface, which keeps its names within a minor version:

- ``quantgrid.schemes``: :class:`QuantScheme`, ``PRESETS``, ``scheme``, ``activation_scheme``;
- ``quantgrid.quantizer``: ``quantize``, ``dequantize``, ``fake_quantize``, ``pack``, ``unpack``;
- ``quantgrid.transforms.recipes`` and ``quantgrid.mitigations.methods``: one module per method;
- ``quantgrid.config.check`` and ``quantgrid.plan.pipeline.Plan``: the steps of a config.
"""
