"""Sizes that jobs compute with and that estimates of their memory read."""

CHUNK = 256  # positions with logits in memory at a time

AUTO = "auto"  # value of `batch_size` that leaves the batches to the jobs
WINDOWS_PER_BATCH = 8  # of a corpus, with AUTO
# Tokens in a batch of task requests with AUTO, padding included. The same for every model and memory,
# so that equal configs give equal protocols.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
UNSHARED_TOKENS = 1024  # the same for requests whose logits are computed at every position


def windows_per_batch(batch_size: int | str) -> int:
    """Return the windows of a corpus in one forward pass, for a ``batch_size`` of the config."""
    return WINDOWS_PER_BATCH if isinstance(batch_size, str) else batch_size


def batch_tokens(device: str) -> int:
    """Return the tokens in a batch of task requests on a type of device."""
    return BATCH_TOKENS["cpu" if device == "cpu" else "cuda"]


HELD = 1 << 31  # bytes of layer inputs that one sweep of a measurement of sensitivities keeps
# rows of embedding and lm_head folded at a time; a multiple of the block size of a rotation
ROWS = 1 << 13
WORKING = 4.5  # memory of layers that are quantized in one call, in units of their weights and second moments
