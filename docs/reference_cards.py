"""Tables of the reference models from their cards (`models/*/README.md`), for
`reference-models.md`."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from statistics import fmean

from quantgrid.reference.card import ACTIVATIONS, LAST
from quantgrid.reference.family import FAMILY


def order(folder: Path) -> tuple[int, str]:
    return list(FAMILY).index(folder.name.removesuffix("-planted")), folder.name


def cards(models: Path) -> dict[str, str]:
    """Name -> text of the card, in the order of the family."""
    return {
        path.parent.name: path.read_text(encoding="utf-8")
        for path in sorted(models.glob("*/README.md"), key=lambda path: order(path.parent))
    }


def losses(card: str) -> dict[str, list[str]]:
    """Row of the held-out table -> nats per token, perplexity per token, perplexity per byte."""
    return {
        name: values.split(" | ")
        for name, values in re.findall(r"^\| ([a-z ]+) \| ([\d.]+ \| [\d.]+ \| [\d.]+) \|$", card, re.MULTILINE)
    }


def sizes(models: Path) -> str:
    """Shape, tokens seen and perplexity, a row for each model."""
    lines = [
        "| model | parameters | hidden, intermediate | layers | heads, key-value heads | tokens seen | perplexity | "
        "of bigrams | bits a byte |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, card in cards(models).items():
        reference = FAMILY[name.removesuffix("-planted")]
        size, training, found = reference.size, reference.training, losses(card)
        parameters = re.search(r"^A [\w -]+ decoder of ([\d,]+) parameters", card, re.MULTILINE)[1]
        lines.append(
            f"| `{name}` | {parameters} | {size.hidden_size}, {size.intermediate_size} | {size.num_hidden_layers} | "
            f"{size.num_attention_heads}, {size.num_key_value_heads} of {size.head_dim} | "
            f"{training.steps * training.tokens_per_step:,} | "
            f"{found['this model'][1]} | {found['bigrams of the whole text'][1]} | "
            f"{math.log2(float(found['this model'][2])):.3f} |"
        )
    return "\n".join(lines)


def trainings(models: Path) -> str:
    """Steps, time and last loss of those that were trained."""
    lines = [
        "| model | steps | minutes of a shared core | tokens a second | loss of the last 50 steps |",
        "|---|---|---|---|---|",
    ]
    for name in FAMILY:
        if (models / name / "training.csv").is_file():
            rows = list(csv.DictReader((models / name / "training.csv").open(encoding="utf-8")))
            seconds = float(rows[-1]["seconds"])
            lines.append(
                f"| `{name}` | {len(rows):,} | {seconds / 60:.0f} | {int(rows[-1]['tokens']) / seconds:,.0f} | "
                f"{fmean(float(row['training_loss']) for row in rows[-LAST:]):.3f} |"
            )
    return "\n".join(lines)


def activations(models: Path) -> str:
    """Statistics of the inputs of the sites, from the cards: one table of all models."""
    head, rule = ACTIVATIONS.splitlines()
    lines = [f"| model {head}", f"|---{rule}"]
    for name, card in cards(models).items():
        lines += [
            f"| `{name}` {row}"
            for row in re.findall(r"^\| `(?:attention|output|mlp|down)_input` \|.*$", card, re.MULTILINE)
        ]
    return "\n".join(lines)


TABLES = {"sizes": sizes, "trainings": trainings, "activations": activations}
