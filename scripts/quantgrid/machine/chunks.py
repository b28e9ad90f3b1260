"""Sizes that jobs compute with and that estimates of their memory read."""

CHUNK = 256  # positions with logits in memory at a time
HELD = 1 << 31  # bytes of layer inputs that one sweep of a measurement of sensitivities keeps
