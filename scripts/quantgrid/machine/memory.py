"""Memory and disk estimates of a job from the sizes of its model. Standard library only.

Estimates are for one attempt; rules multiply them by the attempt, so that a job killed for its
memory gets more. They are upper bounds, not tight: the peaks measured on SmolLM2-135M and on three
billion parameters are below them (tests/unit/machine/test_resources.py).
"""

from __future__ import annotations

from ..models.counts import all_weights, held_moments, layer_moments, layer_weights
from ..models.plans import SITES
from ..models.shapes import ModelShape
from .chunks import CHUNK, HELD, ROWS, WORKING
from .malloc import LARGE, gives_back, layer_bytes

START = 700  # MiB: Python, torch and transformers
IMPORTS = 477  # MiB: half a GB
PROCESS = 400  # MiB: Snakemake inside a cluster job
MIB = 2**20
PIECE = 1024  # tokens, or one window, of a training in one forward pass (learning/objectives.py)
# bytes that the layers of a training may keep for the backward pass (learning/network.py)
KEPT = 1 << 32
SCREENED = ("decompose_model", "propagate_model", "evaluate_perplexity")  # parts of a first look of a race
WHOLE = 1 << 33  # bytes of float32 weights up to which the model gate runs the whole model
CONTEXT = 700  # MiB of a GPU: the CUDA context and the workspaces of its libraries
# settings of a config that lower the memory of a job, by rule or kind of work
LESS_MEMORY = {
    "calibrate_model": "use fewer or shorter windows in its corpus",
    "propagate_model": "use fewer or shorter windows in its corpus",
    "screen_cell": "lower `evaluation.batch_size`, or use fewer or shorter windows in the corpus of its calibration",
    "measure_sensitivity": "use shorter windows in its corpus",
    "learn_transform": "lower `batch_size` of the transform",
    "train_mitigation": "lower `batch_size` of the mitigation",
    **dict.fromkeys(("evaluate_reference", "evaluate_perplexity", "evaluate_tasks"), "lower `evaluation.batch_size`"),
    "measure_residual_error": "lower `evaluation.residual_error_windows`",
}


def parameters(shape: ModelShape) -> int:
    """Number of weights in linears, embedding and lm_head, the lm_head counted even if tied."""
    return all_weights(shape) + 2 * shape.vocabulary * shape.hidden_size


def kept_bytes(shape: ModelShape) -> int:
    """Bytes per token that all layers keep for the backward pass of a training.

    Measured on SmolLM2-135M, rounded up. A token reaches some of the experts, each on a copy of its input. Linear
    attention keeps float32 copies of queries, keys and values, and matrices of 64 tokens per head.
    """
    sparse = shape.active_experts * (shape.expert_size + shape.hidden_size) + shape.shared_size
    linear = 8 * len(shape.linear_layers) * shape.linear_heads * shape.linear_head_dim
    return 4 * (shape.layers * (16 * shape.hidden_size + 8 * max(sparse, shape.intermediate_size)) + linear)


def held_mb(shape: ModelShape, tokens: int) -> int:
    """MiB for running and quantizing a model layer by layer on ``tokens`` calibration tokens.

    Embedding, lm_head, one layer and the hidden states of all windows in float32, second moments
    and weights of one layer in float64, half a GB of imports.
    """
    layer, ends = layer_weights(shape), 2 * shape.vocabulary * shape.hidden_size
    return int((4 * (ends + layer + tokens * shape.hidden_size) + 8 * (held_moments(shape) + layer)) / MIB + IMPORTS)


def peak_mb(job: str, shape: ModelShape, tokens: int = 0, batch: int = 1) -> int:
    """Peak memory in MiB of a ``job`` on a model of ``shape``.

    ``job`` is a rule, or a kind within one (``workload.kind``); ``tokens`` in its windows, ``batch``
    tokens in one forward pass. Forward passes count four bytes per weight, because the CPU computes
    in float32. One decoder layer at a time is in memory, with embedding, lm_head and the hidden
    states of all windows; trainings and lm-eval tasks hold the whole model.
    """
    weights, one = 4 * parameters(shape), layer_weights(shape)
    ends = 4 * 2 * shape.vocabulary * shape.hidden_size
    hidden = 4 * tokens * shape.hidden_size
    logits = 2 * 4 * batch * shape.vocabulary
    piece = max(PIECE, batch)
    backward = min(KEPT, piece * kept_bytes(shape)) + 5 * 4 * max(CHUNK, batch) * shape.vocabulary
    chunk = 6 * 4 * CHUNK * shape.vocabulary
    moments = held_moments(shape)
    widest = max(size for site in SITES for size in shape.site_sizes(site)) ** 2
    layer = layer_bytes(shape)
    together = WORKING * min(LARGE, shape.layers * layer)  # layers that are quantized in one call
    gaps = 0 if gives_back(shape) else 4 * shape.layers * one  # gaps between blocks that are kept
    running = ends + 8 * one + hidden + gaps  # a layer as stored and in float32
    needed = {
        "fetch_model": 0,
        "convert_model": weights,
        "tokenize_corpus": 0,
        "calibrate_model": running + 8 * moments + 16 * widest,
        "measure_sensitivity": running
        + min(HELD, (shape.layers + 2) * hidden)
        + batch * kept_bytes(shape) / shape.layers
        + 5 * 4 * CHUNK * shape.vocabulary,
        "fit_transform": 3 * layer,
        "learn_transform": 3 * weights + backward,
        "gate_model": min(weights, WHOLE + ends) + running + 2 * logits,
        "gate_transform": 3 * layer + 1.5 * ends + running + 2 * logits,
        "measure_distributions": 2 * layer,
        "quantize_model": max(together, 2.5 * layer, ends) + gaps,
        "measure_schemes": 2 * max(together, 4 * layer) + gaps,
        "allocate_bits": 0,
        "decompose_model": max(together, 4 * layer, ends) + gaps,
        "propagate_model": max(together, 4.5 * layer) + ends + 2 * hidden + gaps,
        "train_mitigation": 10.5 * weights + 2 * logits,
        "evaluate_reference": running,
        "evaluate_perplexity": max(
            running, 1.5 * ends + 2 * hidden + chunk + gaps
        ),  # layers, then the lm_heads and final states of both models
        "merge_shards": 0,
        "decide_race": 0,
        "evaluate_tasks": 1.5 * weights + logits,
        "measure_residual_error": 2 * running,
        "export_model": 2 * weights + hidden + 2 * logits,  # the exported model of the check, in float32
    }
    needed["screen_cell"] = max(needed[part] for part in SCREENED)
    return START + int(needed[job] / MIB)


def disk_bytes(job: str, shape: ModelShape, tokens: int = 0) -> int:
    """Upper bound in bytes of the files written by ``job``, named as for :func:`peak_mb`.

    A packed checkpoint counts twice, because its tensors first go to a second file. A fetched model
    counts as bfloat16, a converted one as float32.
    """
    packed = 0.6 * all_weights(shape) + 4 * shape.vocabulary * shape.hidden_size
    return int(
        {
            "fetch_model": 2 * parameters(shape),
            "convert_model": 4 * parameters(shape),
            "calibrate_model": 4 * shape.layers * layer_moments(shape),
            **dict.fromkeys(("quantize_model", "decompose_model"), 2 * packed),
            # states of both models behind a layer, while the file of the layer before it is still there
            **dict.fromkeys(("propagate_model", "screen_cell"), 2 * packed + 16 * tokens * shape.hidden_size),
            # weights, moments and the best weights of a training, twice while they are saved
            "train_mitigation": packed + 2 * 16 * all_weights(shape),
            "export_model": 2 * parameters(shape),  # dense weights are the largest target
            "evaluate_reference": 4 * tokens * shape.hidden_size,
        }.get(job, 0)
    )


def memory_mb(job: str, shape: ModelShape, tokens: int = 0, batch: int = 1) -> int:
    """MiB requested from a scheduler: :func:`peak_mb` plus the Snakemake process of the job."""
    return PROCESS + peak_mb(job, shape, tokens, batch)


def card_mb(job: str, shape: ModelShape, tokens: int = 0, batch: int = 1, width: int = 2) -> int:
    """Peak memory of a GPU in MiB of a ``job`` on a model of ``shape``; 0 for jobs that compute on the CPU.

    ``job``, ``tokens`` and ``batch`` as for :func:`peak_mb`, of whose terms this consists; ``width`` is the
    number of bytes of a weight in a forward pass. Nothing was measured on a GPU.
    """
    weights, one = parameters(shape), layer_weights(shape)
    ends, logits = 2 * shape.vocabulary * shape.hidden_size, 2 * 4 * batch * shape.vocabulary
    hidden, layer = width * tokens * shape.hidden_size, layer_bytes(shape)
    inner = max(shape.intermediate_size, shape.active_experts * shape.expert_size)
    passing = 4 * batch * (8 * shape.hidden_size + 6 * inner)  # activations of one layer, rounded in float32
    running = width * (ends + one) + 2 * one + hidden + passing  # a layer with its codes
    together = WORKING * min(LARGE, shape.layers * layer)
    rows = 4 * 8 * ROWS * shape.hidden_size  # of embedding and lm_head in float64
    widest = max(size for site in SITES for size in shape.site_sizes(site)) ** 2
    backward = min(KEPT, max(PIECE, batch) * kept_bytes(shape)) + 5 * 4 * max(CHUNK, batch) * shape.vocabulary
    needed = {
        "calibrate_model": running + 8 * held_moments(shape) + 16 * widest,
        "fit_transform": 3 * layer,
        "learn_transform": 3 * 4 * weights + backward,
        "measure_distributions": 2 * layer,
        "quantize_model": max(together, 2.5 * layer) + rows,
        "measure_schemes": 2 * max(together, 4 * layer) + rows,
        "decompose_model": max(together, 4 * layer) + rows,
        "propagate_model": max(together, 4.5 * layer) + rows + running + hidden,
        "train_mitigation": 9.5 * 4 * weights + 2 * logits,
        "evaluate_reference": running,
        "evaluate_perplexity": max(running, 1.5 * width * ends + 2 * hidden + 6 * 4 * CHUNK * shape.vocabulary),
        "evaluate_tasks": width * weights + 4 * one + logits + passing,
        "measure_residual_error": 2 * running,
        "measure_sensitivity": running
        + min(HELD, (shape.layers + 2) * hidden)
        + batch * kept_bytes(shape) / shape.layers
        + 5 * 4 * CHUNK * shape.vocabulary,
    }
    needed["screen_cell"] = max(needed[part] for part in SCREENED)
    return CONTEXT + int(needed[job] / MIB) if job in needed else 0


def less_memory(job: str) -> str:
    """Advice for a ``job``, a rule or a kind of work, that has too little memory on a GPU."""
    return "; or ".join(
        filter(None, (LESS_MEMORY.get(job), "set `compute: {device: cpu}` or use a GPU with more memory"))
    )
