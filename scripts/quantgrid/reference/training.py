"""Training loop of a reference model: AdamW on windows of the token stream, resumable bit for bit.

Matrix products run in the dtype of the recipe (bfloat16 by autocast); weights and optimizer are float32. Seed and step
determine the batches. The state is one safetensors file: weights, moments, and in its header the
step and the loss curve.
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

from ..corpora import library_docs, token_windows
from ..ground.errors import ConfigError
from ..ground.storage import open_tensors, read_metadata, write_tensors
from ..inference.transform import derived_seed
from . import text
from .family import Reference, Training
from .text import POSITIONS, VOCABULARY

HEADER = "step,tokens,training_loss,held_out_loss,seconds\n"
MONITORED = 16  # held-out windows for the loss curve
_EVERY = 50  # steps between held-out losses
_SAVE_SECONDS = 120.0


def new_model(reference: Reference) -> nn.Module:
    """transformers' model of ``reference``, float32, normal weights with standard deviation 0.02."""
    import transformers

    torch.manual_seed(reference.training.seed)
    architecture = getattr(transformers, reference.architecture)
    return architecture(
        architecture.config_class(
            **asdict(reference.size),
            **reference.settings,
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
        )
    )


def loss_of(model: nn.Module, batch: Tensor, autocast: bool, balance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood (nats) of ``batch`` [windows, window] without first tokens, and the loss
    to train on.

    The latter adds ``balance`` times the load-balancing loss of a mixture of experts, as transformers
    computes it. ``autocast`` runs products in bfloat16.
    """
    routing = {"output_router_logits": True} if balance else {}
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        output = model(input_ids=batch, use_cache=False, **routing)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss, loss + balance * output.aux_loss if balance else loss


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, autocast: bool, batch: int = 4) -> float:
    """:func:`loss_of` over all ``windows`` [count, window], ``batch`` at a time, without
    gradients."""
    return sum(loss_of(model, part, autocast)[0].item() * len(part) for part in windows.split(batch)) / len(windows)


def monitored(tokenizer: Path, window: int) -> Tensor:
    """Windows of the held-out loss curve, evenly spread over the calibration part.

    The result is int64 [MONITORED, window]. The evaluation part stays unused until a model is
    finished.
    """
    entry = {"source": "library_docs", "part": "calibration", "window": window}
    windows, _ = token_windows.tokenize(entry, tokenizer)
    return windows[:: len(windows) // MONITORED][:MONITORED]


def batch_of(step: int, count: int, training: Training) -> Tensor:
    """Indices of the windows of ``step``: a random order of all ``count`` is used up before the
    next one."""
    per_epoch = count // training.batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(
        count, generator=torch.Generator().manual_seed(derived_seed(training.seed, "reference", epoch))
    )
    return order[place * training.batch : (place + 1) * training.batch]


def _continues(before: Training, now: Training, step: int) -> bool:
    """Check whether ``step`` steps of recipe ``before`` equal those of ``now``; total steps may
    differ."""
    return replace(before, steps=now.steps) == now and all(
        before.rate_at(done) == now.rate_at(done) for done in range(step)
    )


class Trainer:
    """Training state of a model: ``step`` finished steps, ``rows`` of its loss curve as text."""

    def __init__(self, reference: Reference, state: Path | None = None):
        self.training, self.state = reference.training, state
        self.model = new_model(reference).train()
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": self.training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.training.rate, betas=self.training.betas, fused=True)
        self.step, self.rows, self.seconds = 0, [], 0.0
        if state is not None and state.is_file():
            self._resume(state)

    def run(
        self,
        windows: Tensor,
        held_out: Tensor,
        until: int | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> None:
        """Train up to step ``until`` (None: to the end) on ``windows`` [count, window].

        Records the loss on ``held_out`` every ``_EVERY`` steps.
        """
        end = self.training.steps if until is None else until
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        for step in progress(range(self.step, end)):
            loss = self._descend(windows[batch_of(step, len(windows), self.training)], self.training.rate_at(step))
            self.step, self.seconds = step + 1, time.monotonic() - begun
            due = self.step % _EVERY == 0 or self.step == self.training.steps
            seen = f"{held_out_loss(self.model, held_out, self.training.autocast):.4f}" if due else ""
            self.rows.append(
                f"{self.step},{self.step * self.training.tokens_per_step},{loss:.4f},{seen},{self.seconds:.0f}\n"
            )
            if self.state is not None and (self.step == end or time.monotonic() - saved >= _SAVE_SECONDS):
                self.save(self.state)
                saved = time.monotonic()

    def _descend(self, batch: Tensor, rate: float) -> float:
        """Run one step on ``batch`` [windows, window] and return its loss."""
        loss, trained_on = loss_of(self.model, batch, self.training.autocast, self.training.balance)
        trained_on.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.largest_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def curve(self) -> str:
        """Loss curve as CSV: losses in nats per token, seconds of wall time."""
        return HEADER + "".join(self.rows)

    def save(self, path: Path) -> None:
        tensors = {f"weight.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for kind, moment in self.optimizer.state.get(p, {}).items():
                tensors[f"{kind}.{name}"] = moment
        write_tensors(
            path,
            tensors,
            {"training": asdict(self.training), "step": self.step, "rows": self.rows, "seconds": self.seconds},
        )

    def _resume(self, path: Path) -> None:
        about = read_metadata(path)
        if not _continues(
            Training(**{**about["training"], "betas": tuple(about["training"]["betas"])}), self.training, about["step"]
        ):
            raise ConfigError(
                f"{path}: training state of another recipe, {about['step']} steps done; "
                "move it away to train from the start"
            )
        self.step, self.rows, self.seconds = about["step"], about["rows"], about["seconds"]
        kinds = ("step", "exp_avg", "exp_avg_sq")
        with open_tensors(path) as file, torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(file.get_tensor(f"weight.{name}"))
                if self.step:
                    self.optimizer.state[p] = {kind: file.get_tensor(f"{kind}.{name}") for kind in kinds}


def first_steps(reference: Reference, tokenizer: Path, steps: int = 15) -> str:
    """Loss curve of the first ``steps`` of a recipe on NumPy's training modules, as CSV.

    Their text is the same on every machine.
    """
    documents = [
        read
        for module, path in library_docs.modules("numpy")
        if library_docs.part_of(module) == "training" and (read := library_docs.docstrings(path))
    ]
    stream = text.stream(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), documents)
    trainer = Trainer(reference)
    trainer.run(
        text.windows(stream, reference.training.window), monitored(tokenizer, reference.training.window), until=steps
    )
    return trainer.curve()
