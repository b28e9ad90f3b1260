"""Publication of a trained reference model as a folder of ``models/``.

The folder has bfloat16 weights, config, tokenizer, loss curve and a card measured on these files.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.storage import replacing, sha256_of, write_json, write_text
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
    _write_model(models / name, weights, trainer.model.config, work)
    write_text(models / name / "training.csv", trainer.curve())
    if name == SMALLEST:
        write_text(models / name / "first-steps.csv", first_steps(reference, models / name))
    _describe(models / name, windows, {**about, "planting": None})
    if reference.planting is not None:
        folder = models / f"{name}-planted"
        size = reference.size
        _write_model(
            folder,
            plant(weights, reference.planting, size.num_hidden_layers, size.head_dim),
            trainer.model.config,
            work,
        )
        _describe(folder, windows, {**about, "planting": reference.planting})


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Weights in bfloat16, without the tied lm_head."""
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}


def _write_model(folder: Path, weights: dict[str, Tensor], config: Any, tokenizer: Path) -> None:
    from safetensors.torch import save_file

    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(
        folder / "config.json", {**config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    )
    for file in _TOKENIZER:
        shutil.copyfile(tokenizer / file, folder / file)


def _describe(folder: Path, windows: Tensor, about: dict[str, Any]) -> None:
    """Measure the written folder and write its card."""
    model, training = measuring.load(folder), about["reference"].training
    seen = windows[torch.cat([batch_of(step, len(windows), training) for step in range(training.steps)])]
    measured = {
        "losses": measuring.losses(model, folder, seen, windows),
        "samples": measuring.samples(model, folder),
        "activations": measuring.activations(model, measuring.part("calibration", folder, training.window)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": {file: sha256_of(folder / file) for file in ("model.safetensors", "tokenizer.json")},
    }
    shape = {"size": asdict(about["reference"].size), "vocabulary": VOCABULARY, "monitored": MONITORED}
    write_card(folder, {**about, **measured, **shape})
