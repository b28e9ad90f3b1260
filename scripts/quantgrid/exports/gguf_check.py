"""Check of a GGUF file against its cell: the weights that it holds, and what llama.cpp computes.

The weights, read by the ``gguf`` package into a transformers model, give logits and perplexity in the
protocol of the grid. llama.cpp (``xllamacpp`` in a separate environment) gives probabilities of all
tokens at some positions, and the token ids of texts. It rounds the inputs of quantized linears to 8
bits, so it always diverges: by 1e-4 nats in most models, by 3e-3 in one with outliers of activations.
The same rounding in the transformers model measures how much; a wrong order of rows costs nats.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
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
from .check import Checked, largest, mean_divergence, require_finite
from .gguf_source import GGUFSource
from .packed_cell import PackedCell
from .verdicts import Verdict

KL = 5e-4  # nats per token that llama.cpp may diverge in any case
TIMES = 4  # and that much more than inputs rounded to 8 bits do
EXACT_KL = 1e-6  # of the weights of an exact file: products of another order
POSITIONS = 64
PYTHON = "QUANTGRID_XLLAMACPP_PYTHON"  # environment variable: an interpreter that has xllamacpp
ENVIRONMENT = ".venv-xllamacpp"
_PROBE = Path(__file__).with_name("llama_cpp_probe.py")
LOADER = """import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, context, 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(parameters)  # HTTP at server.listening_address
"""
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\na paragraph\r\n  indented: it's, we'll, I'D, they've",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}' if x != 1234567890 else \"a\\n\"\n",
    "Übergrößenträger, naïve façade, español: ¿qué? «guillemets» — em—dash…",
    "数据 と 日本語, 한국어, русский текст, עברית, हिन्दी, ไทย",
    "emoji 🙂👍🏽 x² ≈ 10⁻⁶ ∑∞ ½ ١٢٣ 12,345.67 0xFF 2026-01-31",
    "CamelCase snake_case kebab-case <b>tag</b> https://example.org/a?b=c&d=%20 \\alpha $x_i^2$",
)


@dataclass(frozen=True, kw_only=True)
class GGUFChecked(Checked):
    """Result of a check: that of the weights in the file, and of llama.cpp.

    ``llama_cpp_kl`` (cell from llama.cpp) and ``rounding_kl`` (cell from the same weights with inputs
    rounded to 8 bits) in nats per token over ``llama_cpp_positions``; ``tokens_equal`` on ``texts``.
    """

    llama_cpp_kl: float
    rounding_kl: float
    llama_cpp_positions: int
    tokens_equal: bool
    texts: int

    @property
    def llama_cpp_kl_accepted(self) -> float:
        return max(KL, TIMES * self.rounding_kl)

    @property
    def is_accepted(self) -> bool:
        divergences = self.kl <= self.kl_accepted and self.llama_cpp_kl <= self.llama_cpp_kl_accepted
        return self.is_finite and divergences and self.tokens_equal

    def lines(self) -> list[str]:
        """Results of llama.cpp in words."""
        return [
            f"KL divergence of llama.cpp from the cell: {self.llama_cpp_kl:.3g} nats per token "
            f"({self.llama_cpp_positions} positions; accepted: {self.llama_cpp_kl_accepted:.3g}); inputs rounded to 8 "
            f"bits, as llama.cpp does, cost {self.rounding_kl:.3g}",
            f"token ids of llama.cpp on {self.texts} texts: {'equal' if self.tokens_equal else 'DIFFERENT'}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "llama_cpp_kl_accepted": self.llama_cpp_kl_accepted}


@torch.no_grad()
def check_gguf(path: str | Path, cell: PackedCell, model: str | Path, windows: Tensor, verdict: Verdict) -> GGUFChecked:
    """Check the file ``path`` against its cell.

    ``model`` is the folder with the tokenizer, ``windows`` (count, window) are evaluation tokens.
    Raises :class:`ConfigError` if llama.cpp is missing or does not load the file.
    """
    python = probe_python()
    cell_model = streamed(cell.without_rounded_cache())
    states, head = final_states(cell_model, windows, 1), head_of(cell_model)
    return GGUFChecked(
        loader="gguf and llama.cpp",
        dtype="float32",
        tokens=windows.numel(),
        kl_accepted=verdict.kl or EXACT_KL,
        windows=windows.shape[0],
        window=windows.shape[1],
        **compare_weights(path, cell, windows, states, head),
        **compare_llama_cpp(path, cell, model, windows, states, head, python),
    )


@torch.no_grad()
def compare_weights(path: str | Path, cell: PackedCell, windows: Tensor, states: Tensor, head: Head) -> dict[str, Any]:
    """Logits and perplexity of the weights in the file, against ``states`` (windows, window, d) of the
    cell."""
    made = streamed(GGUFSource(path, cell.config))
    hidden, own_head = final_states(made, windows, 1), head_of(made)
    pairs = [
        (
            window_losses(hidden[number], own_head, tokens, (states[number], head)),
            window_losses(states[number], head, tokens)[0],
        )
        for number, tokens in enumerate(windows)
    ]
    require_finite(own for _, own in pairs)
    value, error = perplexity([losses[0] for losses, _ in pairs])
    return {
        "max_logit_difference": largest(
            (own_head(rows) - head(wanted)).abs().max().item()
            for rows, wanted in zip(hidden.flatten(0, 1).split(CHUNK), states.flatten(0, 1).split(CHUNK))
        ),
        "kl": mean_divergence(losses[1] for losses, _ in pairs),  # type: ignore[misc]
        "perplexity": value,
        "perplexity_error": error,
        "cell_perplexity": perplexity([own for _, own in pairs])[0],
    }


@torch.no_grad()
def compare_llama_cpp(
    path: str | Path, cell: PackedCell, model: str | Path, windows: Tensor, states: Tensor, head: Head, python: Path
) -> dict[str, Any]:
    """Probabilities and token ids of llama.cpp, and what rounded inputs alone cost at its positions."""
    lengths = spread(*windows.shape)
    used = windows[: len(lengths)]
    found, tokens = run_probe(path, used.tolist(), lengths, head.weight.shape[0], python)
    rounded = final_states(streamed(GGUFSource(path, cell.config, rounded_inputs=True)), used, 1)
    logs, rounded_logs = (log_softmax(head(_at(held, lengths)).float(), -1) for held in (states, rounded))
    tokenizer = load_tokenizer(model)
    return {
        "llama_cpp_kl": _divergence(logs, found),
        "rounding_kl": _divergence(logs, rounded_logs),
        "llama_cpp_positions": len(found),
        "tokens_equal": tokens == [token_ids(tokenizer, text) for text in TEXTS],
        "texts": len(TEXTS),
    }


def _at(states: Tensor, lengths: list[list[int]]) -> Tensor:
    """States (positions, d) after the first ``lengths`` tokens of each window."""
    return torch.stack([states[window, length - 1] for window, found in enumerate(lengths) for length in found])


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL of ``found`` from ``wanted``, both log-probabilities (positions, vocabulary)."""
    return mean_divergence(kl_div(found, wanted, reduction="none", log_target=True).sum(-1).tolist())


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
        "code": LOADER,
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
