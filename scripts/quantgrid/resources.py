"""The memory that a job asks a scheduler for, from the sizes of its model. Standard library only.

Estimates for one attempt; rules multiply them by the attempt, so that a job that was killed for its memory comes back with more. They
are made to be enough, not tight: the peaks measured on SmolLM2-135M and on three billion parameters lie below them (tests/test_resources.py).
"""

from __future__ import annotations

from .allocator import LARGE, gives_back, layer_bytes
from .architecture import SITES, ModelShape, layer_moments, layer_weights

START = 700  # MiB: Python, torch and transformers
IMPORTS = 477  # MiB: half a GB
PROCESS = 400  # MiB: Snakemake inside a cluster job
MIB = 2**20
PIECE = 1024  # tokens, or one window, that a training holds at a time (learning/objectives.py)
KEPT = 1 << 32  # bytes that the layers of a training may keep for the way back (learning/network.py)
CHUNK = 256  # positions whose logits exist at a time (evaluation/perplexity.py)


def parameters(shape: ModelShape) -> int:
    """Weights of the linears and of embedding and head, the head counted by itself though it may be tied."""
    return shape.layers * layer_weights(shape) + 2 * shape.vocabulary * shape.hidden_size


def kept_bytes(shape: ModelShape) -> int:
    """Bytes that all layers keep of one token for the way back of a training: measured on SmolLM2-135M, rounded up."""
    return 4 * shape.layers * (16 * shape.hidden_size + 8 * shape.intermediate_size)


def held_mb(shape: ModelShape, tokens: int) -> int:
    """MiB that have to be held where a model is run and quantized one decoder layer at a time on ``tokens`` tokens of calibration: embedding and
    head, one layer, and the hidden states of all windows in float32, second moments and weights of one layer in float64, half a GB of imports."""
    layer, ends = layer_weights(shape), 2 * shape.vocabulary * shape.hidden_size
    return int((4 * (ends + layer + tokens * shape.hidden_size) + 8 * (layer_moments(shape) + layer)) / MIB + IMPORTS)


def peak_mb(job: str, shape: ModelShape, tokens: int = 0, batch: int = 1) -> int:
    """MiB at the peak of a ``job`` (a rule, or what ``demands.kind`` tells apart within one) on a model of ``shape``; ``tokens`` in its windows,
    ``batch`` tokens in one forward pass.

    What runs a model counts four bytes a weight: the CPU computes in float32. One decoder layer at a time is in memory, beside embedding and
    head and the hidden states of all windows; jobs that train, and tasks through lm-eval, hold the whole model.
    """
    weights, one = 4 * parameters(shape), layer_weights(shape)
    ends = 4 * 2 * shape.vocabulary * shape.hidden_size
    hidden = 4 * tokens * shape.hidden_size
    logits = 2 * 4 * batch * shape.vocabulary
    piece = max(PIECE, batch)
    backward = min(KEPT, piece * kept_bytes(shape)) + 5 * 4 * piece * shape.vocabulary
    chunk = 6 * 4 * CHUNK * shape.vocabulary
    moments, widest = layer_moments(shape), max(shape.site_size(site) for site in SITES) ** 2
    layer = layer_bytes(shape)
    together = 4.5 * min(LARGE, shape.layers * layer)  # layers that are quantized in one call
    gaps = 0 if gives_back(shape) else 4 * shape.layers * one  # between blocks that are kept
    running = ends + 8 * one + hidden + gaps  # a layer as it is stored and in float32
    needed = {"fetch_model": 0, "convert_model": weights, "tokenize_corpus": 0, "calibrate_model": running + 8 * moments + 16 * widest,
              "fit_transform": 3 * layer, "learn_transform": 3 * weights + backward, "describe_transform": 2 * layer,
              "quantize_model": max(together, 2.5 * layer, ends) + gaps, "decompose_model": max(together, 4 * layer, ends) + gaps,
              "propagate_model": max(together, 4 * layer) + ends + 2 * hidden + gaps,
              "train_model": 8 * weights + 2 * logits, "evaluate_reference": running,
              "evaluate_perplexity": max(running, 1.5 * ends + 2 * hidden + chunk + gaps),  # layers; then both heads and both models' states
              "evaluate_tasks": 1.5 * weights + logits, "measure_depth": 2 * running}[job]
    return START + int(needed / MIB)


def disk_bytes(job: str, shape: ModelShape, tokens: int = 0) -> int:
    """Bytes that a ``job``, named as for :func:`peak_mb`, writes at most: a packed checkpoint counts twice, since its tensors wait in a second file
    until all of them are there. A model that is fetched counts as bfloat16, one that is converted as float32."""
    packed = 0.6 * shape.layers * layer_weights(shape) + 4 * shape.vocabulary * shape.hidden_size
    return int({"fetch_model": 2 * parameters(shape), "convert_model": 4 * parameters(shape),
                "calibrate_model": 4 * shape.layers * layer_moments(shape),
                **dict.fromkeys(("quantize_model", "decompose_model", "propagate_model"), 2 * packed), "train_model": packed,
                "evaluate_reference": 4 * tokens * shape.hidden_size}.get(job, 0))


def memory_mb(job: str, shape: ModelShape, tokens: int = 0, batch: int = 1) -> int:
    """MiB that a scheduler is asked for: :func:`peak_mb` and what Snakemake takes beside the job."""
    return PROCESS + peak_mb(job, shape, tokens, batch)
