"""Sizes that jobs compute with and that estimates of their memory read."""

CHUNK = 256  # positions with logits in memory at a time
# rows of embedding and lm_head folded at a time; a multiple of the block size of a rotation
ROWS = 1 << 13
WORKING = 4.5  # memory of layers that are quantized in one call, in units of their weights and second moments
