"""Check of a GGUF file against its cell: the weights that it holds, and what llama.cpp computes.

The weights, read by the ``gguf`` package into a transformers model, give logits and perplexity in the
protocol of the grid. llama.cpp (``xllamacpp`` in a separate environment) gives probabilities of all
tokens at some positions, and the token ids of texts. It rounds the inputs of quantized linears to 8
bits, so its divergence is never 0: right files measure 1e-4 nats, a wrong order of rows whole nats.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..calibration.streaming import streamed
from ..corpora.tokenization import load_tokenizer, token_ids
from ..evaluation.perplexity import final_states, window_losses
from ..evaluation.significance import perplexity
from ..ground.errors import ConfigError
from ..ground.places import ROOT
from ..ground.storage import open_tensors
from ..machine.chunks import CHUNK
from ..models.lm_head import Head, head_of
from .gguf_source import GGUFSource
from .packed_cell import PackedCell
from .verdicts import Verdict

KL = 5e-4  # nats per token: largest accepted divergence of llama.cpp
EXACT_KL = 1e-6  # of the weights of an exact file: products of another order
POSITIONS = 64
PYTHON = "QUANTGRID_XLLAMACPP_PYTHON"  # environment variable: an interpreter that has xllamacpp
ENVIRONMENT = ".venv-xllamacpp"
_PROBE = Path(__file__).with_name("llama_cpp_probe.py")
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\na paragraph\r\n  indented: it's, we'll, I'D, they've",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}' if x != 1234567890 else \"a\\n\"\n",
    "Übergrößenträger, naïve façade, español: ¿qué? «guillemets» — em—dash…",
    "数据 と 日本語, 한국어, русский текст, עברית, हिन्दी, ไทย",
    "emoji 🙂👍🏽 x² ≈ 10⁻⁶ ∑∞ ½ ١٢٣ 12,345.67 0xFF 2026-01-31",
    "CamelCase snake_case kebab-case <b>tag</b> https://example.org/a?b=c&d=%20 \\alpha $x_i^2$",
)


@torch.no_grad()
def check_gguf(
    path: str | Path,
    cell: PackedCell,
    model: str | Path,
    windows: Tensor,
    verdict: Verdict,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Figures of the check of the file ``path`` for its cell, and ``accepted``.

    ``model`` is the folder with the tokenizer, ``windows`` (count, window) are evaluation tokens.
    Raises :class:`ConfigError` if llama.cpp is missing or does not load the file.
    """
    python = probe_python()
    cell_model = streamed(cell.without_rounded_cache())
    states, head = final_states(cell_model, windows, 1, progress), head_of(cell_model)
    found = {
        **compare_weights(path, cell, windows, states, head, progress),
        **compare_llama_cpp(path, model, windows, states, head, python),
    }
    limit = verdict.kl or EXACT_KL
    accepted = found["kl"] <= limit and found["llama_cpp_kl"] <= KL and found["tokens_equal"]
    return {**found, "kl_accepted": limit, "llama_cpp_kl_accepted": KL, "accepted": accepted}


def compare_weights(
    path: str | Path,
    cell: PackedCell,
    windows: Tensor,
    states: Tensor,
    head: Head,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Logits and perplexity of the weights in the file, against ``states`` (windows, window, d) of the
    cell: ``max_logit_difference``, ``kl`` in nats per token, both perplexities."""
    made = streamed(GGUFSource(path, cell.config))
    hidden, own_head = final_states(made, windows, 1, progress), head_of(made)
    pairs = [
        (
            window_losses(hidden[number], own_head, tokens, (states[number], head)),
            window_losses(states[number], head, tokens)[0],
        )
        for number, tokens in enumerate(windows)
    ]
    value, error = perplexity([losses[0] for losses, _ in pairs])
    return {
        "max_logit_difference": max(
            (own_head(rows) - head(wanted)).abs().max().item()
            for rows, wanted in zip(hidden.flatten(0, 1).split(CHUNK), states.flatten(0, 1).split(CHUNK))
        ),
        "kl": max(0.0, sum(losses[1] for losses, _ in pairs) / len(pairs)),  # type: ignore[misc]
        "perplexity": value,
        "perplexity_error": error,
        "cell_perplexity": perplexity([own for _, own in pairs])[0],
        "windows": windows.shape[0],
        "window": windows.shape[1],
    }


def compare_llama_cpp(
    path: str | Path, model: str | Path, windows: Tensor, states: Tensor, head: Head, python: Path
) -> dict[str, Any]:
    """Probabilities and token ids of llama.cpp: ``llama_cpp_kl`` from the cell in nats per position
    over ``llama_cpp_positions``, and ``tokens_equal`` on ``TEXTS``."""
    lengths = spread(*windows.shape)
    rows, tokens = run_probe(path, windows[: len(lengths)].tolist(), lengths, head.weight.shape[0], python)
    wanted = torch.stack([states[window, length - 1] for window, found in enumerate(lengths) for length in found])
    logs = log_softmax(head(wanted).float(), -1)
    tokenizer = load_tokenizer(model)
    return {
        "llama_cpp_kl": max(0.0, kl_div(rows, logs, reduction="sum", log_target=True).item() / len(rows)),
        "llama_cpp_positions": len(rows),
        "tokens_equal": tokens == [token_ids(tokenizer, text) for text in TEXTS],
        "texts": len(TEXTS),
    }


def spread(windows: int, window: int, positions: int = POSITIONS, most: int = 4) -> list[list[int]]:
    """Lengths of the beginnings of at most ``most`` windows, evenly spread: at least ``positions`` in
    all, or all that there are."""
    count = min(windows, most)
    each = min(window, -(-positions // count))
    return [[(number + 1) * window // each for number in range(each)] for _ in range(count)]


def probe_python() -> Path:
    """Interpreter of the environment with ``xllamacpp``; :class:`ConfigError` names the make target."""
    python = Path(os.environ.get(PYTHON) or ROOT / ENVIRONMENT / "bin" / "python")
    if not python.is_file():
        raise ConfigError(
            f"the check of a GGUF file needs xllamacpp: `make {ENVIRONMENT}/.installed` makes its environment "
            f"({PYTHON} names another interpreter)"
        )
    return python


def run_probe(
    path: str | Path, windows: list[list[int]], lengths: list[list[int]], vocabulary: int, python: Path
) -> tuple[Tensor, list[list[int]]]:
    """Log-probabilities (positions, vocabulary) after the first ``lengths`` tokens of ``windows``, and
    the ids of ``TEXTS``, by llama.cpp."""
    request = {
        "model": str(Path(path).resolve()),
        "vocabulary": vocabulary,
        "threads": torch.get_num_threads(),
        "windows": windows,
        "lengths": lengths,
        "texts": TEXTS,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run([python, "-I", _PROBE, asked, answer], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ConfigError(f"{path}: llama.cpp does not run it: {' | '.join(lines[-3:])[:400]}")
        with open_tensors(answer) as file:
            return file.get_tensor("log_probabilities"), json.loads(file.metadata()["tokens"])
