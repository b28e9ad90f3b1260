"""Check of an exported folder: an independent program loads it and has to compute what the cell does.

Logits are compared on a few windows and losses on all of them, in the same protocol as the cell's
perplexity. The cell is streamed, so that one of the two models is whole in memory.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.streaming import streamed
from ..evaluation.perplexity import final_hidden, window_losses
from ..evaluation.significance import perplexity
from ..ground.errors import ConfigError
from ..ground.storage import read_json, read_tensors, write_json, write_tensors
from ..models.lm_head import Head, head_of
from ..quantization.checkpoints import PackedCheckpoint
from .input_check import InputsChecked, compare_inputs, share_accepted
from .loaders import Loader
from .verdicts import Verdict

COMPARED, LENGTH = 4, 512  # windows and tokens of each whose logits are compared
PYTHON = "QUANTGRID_GPTQMODEL_PYTHON"
_ROOT = Path(__file__).resolve().parents[3]
_PROBE = Path(__file__).with_name("gptqmodel_probe.py")
_OUTSIDE = "gptqmodel"
# no network, and no compilation of kernels, which takes longer than a check
_QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Checked:
    """Result of a check.

    ``kl`` (cell from export, nats per token) and ``max_logit_difference`` are over ``tokens`` compared
    tokens, ``kl_accepted`` is the verdict's bound. Perplexities have standard errors over windows.
    ``served_kl`` is that of the loader in the export's own dtype, where the check has another, and
    ``served_kl_accepted`` the verdict's bound. ``inputs`` is the comparison of rounded inputs.
    """

    loader: str
    dtype: str
    tokens: int
    max_logit_difference: float
    kl: float
    kl_accepted: float
    perplexity: float
    perplexity_error: float | None
    cell_perplexity: float
    windows: int
    window: int
    served_dtype: str | None = None
    served_kl: float | None = None
    served_kl_accepted: float = 0.0
    inputs: InputsChecked | None = None

    def lines(self) -> list[str]:
        """Further results of the check, in words."""
        found = [] if self.inputs is None else [self.inputs.text()]
        if self.served_kl is not None:
            found.append(
                f"KL divergence from the cell of the loader in {self.served_dtype}: {self.served_kl:.3g} nats per "
                f"token (accepted: {self.served_kl_accepted:.3g})"
            )
        return found

    @property
    def is_accepted(self) -> bool:
        """Check the bounds; without one every logit has to be equal in the dtype of the check."""
        equal = self.kl <= self.kl_accepted if self.kl_accepted else self.max_logit_difference == 0
        rounds = self.inputs is None or self.inputs.is_accepted
        return self.is_finite and equal and rounds and (self.served_kl or 0.0) <= self.served_kl_accepted

    @property
    def is_finite(self) -> bool:
        """Check whether every figure is a number; NaN or infinity is never accepted."""
        return all(math.isfinite(value) for value in vars(self).values() if isinstance(value, float))

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON; None for NaN and infinity."""
        figures = asdict(self)
        for held in (figures, figures["inputs"] or {}):
            held |= {n: None for n, value in held.items() if isinstance(value, float) and not math.isfinite(value)}
        return {**figures, "accepted": self.is_accepted}


def require_loader(loader: Loader) -> None:
    """Raise :class:`ConfigError` if a package that the check needs is not installed."""
    if loader.name == _OUTSIDE:
        python = outside_python()
        if not python.is_file():
            raise ConfigError(
                f"the check needs gptqmodel in a separate environment: make .venv-gptqmodel/.installed, "
                f"or {PYTHON}=PYTHON ({python} does not exist)"
            )
        return
    for package in loader.packages:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ConfigError(f"the check needs {package}: install envs/requirements.txt")


def outside_python() -> Path:
    return Path(os.environ.get(PYTHON) or _ROOT / ".venv-gptqmodel" / "bin" / "python")


@torch.no_grad()
def check(
    folder: Path,
    checkpoint: Path,
    manifest: Path | None,
    windows: Tensor,
    loader: Loader,
    verdict: Verdict,
    served: str,
) -> Checked:
    """Compare an exported ``folder``, of dtype ``served``, with its cell on ``windows`` (count, window)."""
    dtype = getattr(torch, verdict.check_dtype)
    compared = windows[:COMPARED, :LENGTH]
    cell, head = _cell_states(checkpoint, manifest, (windows, compared), dtype)
    own = [window_losses(hidden, head, tokens)[0] for hidden, tokens in zip(cell[0], windows)]
    require_finite(own)
    outputs = _outside if loader.name == _OUTSIDE else _inside
    with outputs(folder, loader, verdict.check_dtype, windows, compared) as (losses, logits, model):
        found = [_difference(head(hidden).float(), made) for hidden, made in zip(cell[1], logits)]
        value, error = perplexity(list(losses))
        inputs = None if model is None else _inputs(checkpoint, manifest, model, compared[:1], verdict)
    served_kl = None
    if served != verdict.check_dtype:
        with outputs(folder, loader, served, windows[:0], compared) as (_, logits, _):
            again = [_difference(head(hidden).float(), made)[1] for hidden, made in zip(cell[1], logits)]
        served_kl = mean_divergence(again)
    return Checked(
        loader.name,
        verdict.check_dtype,
        compared.numel(),
        largest(difference for difference, _ in found),
        mean_divergence(kl for _, kl in found),
        verdict.kl,
        value,
        error,
        perplexity(own)[0],
        *windows.shape,
        served if served_kl is not None else None,
        served_kl,
        verdict.served_kl,
        inputs,
    )


def _inputs(
    checkpoint: Path, manifest: Path | None, model: nn.Module, tokens: Tensor, verdict: Verdict
) -> InputsChecked | None:
    """Comparison of rounded inputs; None if the cell rounds none."""
    packed = PackedCheckpoint(checkpoint, getattr(torch, verdict.check_dtype), manifest=manifest)
    if not packed.about["activations"]:
        return None
    packed.about = {**packed.about, "schemes": {**packed.about["schemes"], "key_value": None}}
    return compare_inputs(packed, model, tokens, share_accepted(verdict.kl))


def _cell_states(
    checkpoint: Path, manifest: Path | None, windows: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Head]:
    """Final hidden states of the cell on both sets of windows, and its head; keys and values unrounded."""
    states = []
    for tokens in windows:
        packed = PackedCheckpoint(checkpoint, dtype, manifest=manifest)
        packed.about = {**packed.about, "schemes": {**packed.about["schemes"], "key_value": None}}
        model = streamed(packed)
        states.append(final_hidden(model, tokens, 1))
    return states, head_of(model)


def require_finite(losses: Iterable[float]) -> None:
    """Raise :class:`ConfigError` if a loss of the cell is NaN or infinite."""
    if not all(math.isfinite(loss) for loss in losses):
        raise ConfigError("the cell cannot be exported: it computes NaN or infinite logits")


def largest(values: Iterable[float]) -> float:
    """Largest of ``values``; NaN if one of them is."""
    return torch.tensor([*values], dtype=torch.float64).max().item()


def mean_divergence(values: Iterable[float]) -> float:
    """Mean of divergences; 0 for one that rounding left below 0, NaN if one of them is."""
    found = [*values]
    mean = sum(found) / len(found)
    return 0.0 if mean < 0 else mean


def _difference(wanted: Tensor, made: Tensor) -> tuple[float, float]:
    """(largest absolute difference, mean KL of wanted from made) of logits (tokens, vocabulary)."""
    logs = wanted.log_softmax(-1).double()
    kl = (logs.exp() * (logs - made.log_softmax(-1).double())).sum(-1).mean()
    return (wanted - made).abs().max().item(), kl.item()


# losses of windows, logits (tokens, vocabulary) of the compared, and the model if it is in this process
Outputs = tuple[Iterable[float], Iterable[Tensor], nn.Module | None]


@contextmanager
def _inside(folder: Path, loader: Loader, dtype: str, windows: Tensor, compared: Tensor) -> Iterator[Outputs]:
    """Outputs of the loader in this process."""
    given: dict[str, Any] = {"folder": str(folder), "dtype": getattr(torch, dtype)}
    with redirect_stderr(io.StringIO()):  # progress bars of the loader
        exec(loader.code, given)
    model = given["model"].eval()
    logits = (model(tokens[None]).logits[0].float() for tokens in compared)
    yield (_loss(model, tokens) for tokens in windows), logits, model


def _loss(model: nn.Module, tokens: Tensor) -> float:
    return window_losses(model(tokens[None]).logits[0], lambda logits: logits, tokens)[0]  # type: ignore[arg-type]


@contextmanager
def _outside(folder: Path, loader: Loader, dtype: str, windows: Tensor, compared: Tensor) -> Iterator[Outputs]:
    """Outputs of the loader in another environment."""
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder.parent) as scratch:
        place = Path(scratch)
        write_tensors(place / "tokens.safetensors", {"windows": windows, "compared": compared.clone()})
        request = {
            "folder": str(folder.absolute()),
            "dtype": dtype,
            "code": loader.code,
            "tokens": str(place / "tokens.safetensors"),
            "result": str(place),
        }
        write_json(place / "request.json", request)
        environment = {**os.environ, **_QUIET, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONPATH", None)
        run = subprocess.run(
            [outside_python(), _PROBE, place / "request.json"], env=environment, capture_output=True, text=True
        )
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
            last = (errors or run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
            raise ConfigError(f"{loader.name} does not load the export: {last}")
        losses = read_json(place / "losses.json")
        if _OUTSIDE not in losses["modules"]:
            raise ConfigError(
                f"{loader.name} did not run the export: its modules are of {', '.join(losses['modules'])}"
            )
        yield losses["losses"], read_tensors(place / "logits.safetensors")["logits"], None
