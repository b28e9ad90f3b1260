"""Model card of a reference model: README.md of its folder, from measurements of the folder."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ..ground.storage import write_text

LAST = 50  # steps averaged for the final training loss

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {reference.kind} decoder of {parameters:,} parameters that quantgrid trained from nothing, to quantize and to \
compare: its weights are ordinary numbers that
no one rounded before, in the bfloat16 they were published in. It writes in the manner of docstrings and is good for \
nothing else.
{planted}
| | |
|---|---|
| hidden size, intermediate size | {size[hidden_size]}, {size[intermediate_size]} |
| layers | {size[num_hidden_layers]} |
| heads, key-value heads, head size | {size[num_attention_heads]}, {size[num_key_value_heads]}, {size[head_dim]} |
{settings}| tokenizer | byte-level BPE, {vocabulary} tokens, `<\\|endoftext\\|>` (0) before every document; \
{bytes:.2f} bytes a token |
| embeddings | tied |
| trained on windows of | {training.window} tokens |

## Text

The docstrings of CPython's standard library and of the packages below, deduplicated by paragraph, split by module \
(`quantgrid.corpora.library_docs`):
{text[documents]:,} documents, {text[characters]:,} characters, {text[tokens]:,} tokens, sha256 of the text \
`{text[text_sha256]}`.
The calibration and evaluation parts share no paragraph with it. Versions: {versions}.

## Training

{training.steps:,} steps of {per_step:,} tokens: {seen:,} tokens, {share:.0%} of the text. AdamW (betas \
{training.betas[0]}, {training.betas[1]};
decay {training.weight_decay} of matrices), rate {training.rate:g} after {training.warm_up} steps of warm-up, falling \
linearly to a tenth over the
last {training.decay_share:.0%} of the steps; {balance}gradients clipped at {training.largest_gradient:g}; seed \
{training.seed}; products in {training.products}, weights
and moments in float32; one CPU thread, {minutes:.0f} minutes on a core shared with other work.
Mean loss of the last {last} steps {loss:.3f} nats per token. `training.csv` has every step; its held-out loss is \
over {monitored} windows of the
calibration part. Made by `make reference-models MODELS={made_from}`.

## Held-out text

The evaluation part, {losses[windows]} windows of {training.window} tokens, every token but the first of a window, in \
float32 with the published
weights:

| model | nats per token | perplexity per token | perplexity per byte |
|---|---|---|---|
{perplexities}

The bigrams fall back on the frequencies, which are a Dirichlet prior whose weight is the best on the calibration part.

## Activations

Of the tokens that calibration keeps (256 drawn and the 16 of largest norm, 16 windows of the calibration part): \
kurtosis of all values of a site
(3 of a normal distribution), and largest channel maximum over the median one; median over layers{and_experts}, and \
the largest.

{header}
{activations}

## Samples

The most likely token each time, after `<|endoftext|>` and the prompt.

{samples}

## Licence

The weights are under the Apache License 2.0, as quantgrid is. They were learnt from the documentation of the \
packages above, each under its own
licence (BSD, MIT, Apache 2.0, MPL 2.0, HPND, PSF); no text of theirs is in this folder.

sha256: `model.safetensors` `{sha256[model.safetensors]}`, `tokenizer.json` `{sha256[tokenizer.json]}`.
"""
ACTIVATIONS = "| site | kurtosis | largest | peak to median | largest |\n|---|---|---|---|---|"
_PLANTED = """
**Planted outliers.** The weights of `{original}`, rescaled so that a few channels are large and the function stays \
what it is (powers of two,
exact in bfloat16): residual channels behind both norms of every layer (channel: factor) {hidden}; channels between \
up and
down {down}; channels of every key-value head {value}.
"""


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write README.md of ``folder`` from the ``facts`` gathered by :mod:`.publishing`."""
    reference, name = facts["reference"], folder.name
    training, made_from = reference.training, name.removesuffix("-planted")
    versions = ", ".join(f"{package} {version}" for package, version in facts["text"]["versions"].items())
    rows = list(csv.DictReader(io.StringIO(facts["curve"])))
    seen = len(rows) * training.tokens_per_step
    settings = "".join(f"| {name} | {_shown(value)} |\n" for name, value in reference.settings.items())
    balance = f"load-balancing loss of the router, times {training.balance:g}; " if training.balance else ""
    write_text(
        folder / "README.md",
        _CARD.format(
            **{key: facts[key] for key in ("parameters", "size", "text", "losses", "sha256")},
            name=name,
            reference=reference,
            settings=settings,
            balance=balance,
            and_experts=" and experts" if training.balance else "",
            training=training,
            made_from=made_from,
            planted=_planted(facts["planting"], made_from),
            vocabulary=facts["vocabulary"],
            monitored=facts["monitored"],
            bytes=facts["losses"]["bytes_per_token"],
            versions=versions,
            per_step=training.tokens_per_step,
            seen=seen,
            share=seen / facts["text"]["tokens"],
            minutes=float(rows[-1]["seconds"]) / 60,
            last=LAST,
            loss=fmean(float(row["training_loss"]) for row in rows[-LAST:]),
            perplexities=_perplexities(facts["losses"]),
            header=ACTIVATIONS,
            activations=activations_table(facts["activations"]),
            samples=_samples(facts["samples"]),
        ),
    )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _planted(planting: Any, original: str) -> str:
    if planting is None:
        return ""
    channels = {
        kind: ", ".join(f"{channel}: {factor:g}" for channel, factor in factors.items())
        for kind, factors in vars(planting).items()
    }
    return _PLANTED.format(original=original, **channels)


def _perplexities(losses: dict[str, float]) -> str:
    names = {
        "model": "this model",
        "seen bigrams": "bigrams of the tokens that it saw",
        "text bigrams": "bigrams of the whole text",
        "seen frequencies": "frequencies of the tokens that it saw",
    }
    return "\n".join(
        f"| {shown} | {losses[key]:.3f} | {math.exp(losses[key]):.2f} | "
        f"{math.exp(losses[key] / losses['bytes_per_token']):.3f} |"
        for key, shown in names.items()
    )


def activations_table(table: dict[str, dict[str, float]]) -> str:
    """Markdown rows: site, median and largest kurtosis, median and largest peak-to-median ratio."""
    columns = ("median kurtosis", "max kurtosis", "median peak_to_median", "max peak_to_median")
    return "\n".join(
        f"| `{site}` | " + " | ".join(f"{row[column]:.3g}" for column in columns) + " |" for site, row in table.items()
    )


def _samples(samples: dict[str, str]) -> str:
    return "\n\n".join(f"```text\n{prompt}▸{continued}\n```" for prompt, continued in samples.items())
