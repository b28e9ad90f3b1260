"""The training loop of a reference model: AdamW on windows of the token stream, a loss curve, and a state from which it goes on bit for bit.

Matrix products run in bfloat16 (autocast), weights and optimizer are kept in float32. Batches are drawn by seed and step. The state is one
safetensors file: weights, moments, and in its header the step and the curve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import corpora, library_docs
from ..errors import ConfigError
from ..storage import open_tensors, read_metadata, write_tensors
from ..transforms.composition import derived_seed
from . import text
from .family import Reference, Size, Training
from .text import POSITIONS, VOCABULARY

HEADER = "step,tokens,training_loss,held_out_loss,seconds\n"
MONITORED = 16        # held-out windows whose loss the curve shows
_EVERY = 50           # steps between them
_SAVE_SECONDS = 120.0


def new_model(size: Size, seed: int) -> nn.Module:
    """transformers' Llama of ``size``, normally distributed weights of deviation 0.02, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**asdict(size), vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
                                        bos_token_id=0, eos_token_id=0, pad_token_id=0, rms_norm_eps=1e-5, initializer_range=0.02))


def loss_of(model: nn.Module, batch: Tensor, autocast: bool = True) -> Tensor:
    """Mean negative log-likelihood (nats) of every token of ``batch`` [windows, window] after the first of its window; ``autocast``: products in
    bfloat16."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int = 4) -> float:
    """The same over all ``windows`` [count, window], ``batch`` at once, without gradients."""
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(batch)) / len(windows)


def monitored(tokenizer: Path, window: int) -> Tensor:
    """The windows of the curve's held-out loss, evenly spread over the calibration part: int64 [MONITORED, window]. The evaluation part stays
    unseen until a model is done."""
    entry = {"source": "library_docs", "part": "calibration", "window": window}
    windows, _ = corpora.tokenize(entry, tokenizer)
    return windows[:: len(windows) // MONITORED][:MONITORED]


def batch_of(step: int, count: int, training: Training) -> Tensor:
    """Which of ``count`` windows ``step`` learns from: all in an order of their own before any comes again."""
    per_epoch = count // training.batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(training.seed, "reference", epoch)))
    return order[place * training.batch : (place + 1) * training.batch]


def _continues(before: Training, now: Training, step: int) -> bool:
    """Whether ``step`` steps by one recipe are what another begins with: they may differ in how many follow."""
    return replace(before, steps=now.steps) == now and all(before.rate_at(done) == now.rate_at(done) for done in range(step))


class Trainer:
    """A model on its way: ``step`` steps done, ``rows`` of its loss curve as text."""

    def __init__(self, reference: Reference, state: Path | None = None):
        self.training, self.state = reference.training, state
        self.model = new_model(reference.size, self.training.seed).train()
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": self.training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.training.rate, betas=self.training.betas, fused=True)
        self.step, self.rows, self.seconds = 0, [], 0.0
        if state is not None and state.is_file():
            self._resume(state)

    def run(self, windows: Tensor, held_out: Tensor, until: int | None = None, progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Train up to step ``until`` (None: to the end) on ``windows`` [count, window]; the loss on ``held_out`` every ``_EVERY`` steps."""
        end = self.training.steps if until is None else until
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        for step in progress(range(self.step, end)):
            loss = self._descend(windows[batch_of(step, len(windows), self.training)], self.training.rate_at(step))
            self.step, self.seconds = step + 1, time.monotonic() - begun
            due = self.step % _EVERY == 0 or self.step == self.training.steps
            seen = f"{held_out_loss(self.model, held_out):.4f}" if due else ""
            self.rows.append(f"{self.step},{self.step * self.training.tokens_per_step},{loss:.4f},{seen},{self.seconds:.0f}\n")
            if self.state is not None and (self.step == end or time.monotonic() - saved >= _SAVE_SECONDS):
                self.save(self.state)
                saved = time.monotonic()

    def _descend(self, batch: Tensor, rate: float) -> float:
        """One step on ``batch`` [windows, window]; returns its loss."""
        loss = loss_of(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.largest_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def curve(self) -> str:
        """The loss curve as CSV: losses in nats per token, seconds of wall time."""
        return HEADER + "".join(self.rows)

    def save(self, path: Path) -> None:
        tensors = {f"weight.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for kind, moment in self.optimizer.state.get(p, {}).items():
                tensors[f"{kind}.{name}"] = moment
        write_tensors(path, tensors, {"training": asdict(self.training), "step": self.step, "rows": self.rows, "seconds": self.seconds})

    def _resume(self, path: Path) -> None:
        about = read_metadata(path)
        if not _continues(Training(**{**about["training"], "betas": tuple(about["training"]["betas"])}), self.training, about["step"]):
            raise ConfigError(f"{path}: a training by another recipe, {about['step']} steps of it done; move it away to train from the start")
        self.step, self.rows, self.seconds = about["step"], about["rows"], about["seconds"]
        kinds = ("step", "exp_avg", "exp_avg_sq")
        with open_tensors(path) as file, torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(file.get_tensor(f"weight.{name}"))
                if self.step:
                    self.optimizer.state[p] = {kind: file.get_tensor(f"{kind}.{name}") for kind in kinds}


def first_steps(reference: Reference, tokenizer: Path, steps: int = 15) -> str:
    """The curve of the first ``steps`` of a recipe on NumPy's training modules alone, whose text is the same on every machine: as CSV."""
    documents = [read for module, path in library_docs.modules("numpy")
                 if library_docs.part_of(module) == "training" and (read := library_docs.docstrings(path))]
    stream = text.stream(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), documents)
    trainer = Trainer(reference)
    trainer.run(text.windows(stream, reference.training.window), monitored(tokenizer, reference.training.window), until=steps)
    return trainer.curve()
