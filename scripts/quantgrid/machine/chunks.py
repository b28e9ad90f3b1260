"""Sizes that jobs compute with and that estimates of their memory read."""

CHUNK = 256  # positions with logits in memory at a time
