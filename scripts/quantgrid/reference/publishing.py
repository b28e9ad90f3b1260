"""Publication of a trained reference model as a folder of ``models/``.

The folder has bfloat16 weights, config, tokenizer, loss curve and a card measured on these files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.storage import sha256_of, write_json, write_text
from . import measuring
from .card import write_card
from .family import FAMILY, SMALLEST
from .planting import plant
from .text import VOCABULARY
from .training import MONITORED, Trainer, batch_of, first_steps

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def publish(name: str, trainer: Trainer, work: Path, text: dict[str, Any], windows: Tensor, models: Path) -> None:
    """Write the fully trained model ``name`` and its planted variant, if any, to ``models``.

    ``windows`` [count, window] are its training tokens.
    """
    reference, weights = FAMILY[name], rounded(trainer.model)
    about = {"text": text, "curve": trainer.curve(), "reference": reference}
    _write_model(models / name, trainer.model, weights, work)
    write_text(models / name / "training.csv", trainer.curve())
    if name == SMALLEST:
        write_text(models / name / "first-steps.csv", first_steps(reference, models / name))
    _describe(models / name, windows, {**about, "planting": None})
    if reference.planting is not None:
        folder = models / f"{name}-planted"
        size = reference.size
        planted = plant(weights, reference.planting, size.num_hidden_layers, size.head_dim)
        _write_model(folder, trainer.model, planted, work)
        _describe(folder, windows, {**about, "planting": reference.planting})


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Weights in bfloat16, without the tied lm_head."""
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}


def _write_model(folder: Path, model: nn.Module, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Write ``weights`` in the file layout of ``model``, in which an expert has tensors by name."""
    config = model.config.to_diff_dict()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary, state_dict=dict(weights))  # which it empties
        os.replace(Path(temporary) / "model.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__], "dtype": "bfloat16"})
    for file in _TOKENIZER:
        shutil.copyfile(tokenizer / file, folder / file)


def _describe(folder: Path, windows: Tensor, about: dict[str, Any]) -> None:
    """Measure the written folder and write its card."""
    model, training = measuring.load(folder), about["reference"].training
    seen = windows[torch.cat([batch_of(step, len(windows), training) for step in range(training.steps)])]
    measured = {
        "losses": measuring.losses(model, folder, seen, windows),
        "samples": measuring.samples(model, folder),
        "activations": measuring.activations(folder, measuring.part("calibration", folder, training.window)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": {file: sha256_of(folder / file) for file in ("model.safetensors", "tokenizer.json")},
    }
    shape = {"size": asdict(about["reference"].size), "vocabulary": VOCABULARY, "monitored": MONITORED}
    write_card(folder, {**about, **measured, **shape})
