"""Gates before anything is quantized: the streamed model against transformers, a transform against its model.

*Model gate*: logits of the model as quantgrid streams it, against those of transformers' own whole
model. *Transform gate*: logits of the transformed model, folded in float64 and run in float32 without
any rounding, against those of the untransformed one. A model or a transform that fails is refused, by
name and with the measured figure. The logit error alone misses little, the divergence alone a lot: a
tiny model that is certain of its next token hides a wrong norm (its logits move, its probabilities do
not), so both have to be small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ..calibration.collect import advance, layer_inputs
from ..calibration.layers import DecoderFolder, first_layers
from ..calibration.streaming import FullPrecision, streamed
from ..corpora.token_windows import load
from ..ground.errors import ConfigError, NumericalFailure
from ..ground.storage import read_json
from ..inference.transform import Transform, folded_ends
from ..models.folders import weight_files
from ..models.lm_head import head_of
from ..models.multimodal import PREFIX, STACKED, in_files, prefix_of
from ..models.plans import END_ROLES
from ..models.shapes import shape_from_folder
from ..models.skeletons import skeleton
from ..models.weight_headers import tensor_headers
from ..quantization.sequential import RunningLayer, Sequential
from .perplexity import final_states

LOGITS, DIVERGENCE, LOSS = 1e-4, 1e-9, 1e-5  # largest accepted errors
NOISE = 10  # times the float32 noise of the untransformed model is accepted too
TOKENS = 128  # of a window
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}  # types of stored tensors that float32 holds exactly


@dataclass(frozen=True)
class Agreement:
    """Differences between two sets of logits of the same tokens.

    ``logits``: largest difference over the standard deviation of the wanted logits. ``divergence``:
    KL per token, in nats; ``loss``: difference of the cross-entropy of the next token, in nats.
    """

    logits: float
    divergence: float
    loss: float

    @classmethod
    def of(cls, found: Tensor, wanted: Tensor, tokens: Tensor) -> Agreement:
        """Compare logits (windows, tokens, vocabulary) of ``tokens`` (windows, tokens).

        Raises :class:`NumericalFailure` if the wanted logits are not finite.
        """
        found, wanted = found.double(), wanted.double()
        if not wanted.isfinite().all():
            raise NumericalFailure("the logits of the model in full precision are NaN or infinite")
        logs, likely = (part.flatten(0, 1).log_softmax(-1) for part in (found, wanted))
        next_tokens = tokens[:, 1:].flatten()
        losses = [cross_entropy(part[:, :-1].flatten(0, 1), next_tokens).item() for part in (found, wanted)]
        return cls(
            ((found - wanted).abs().max() / wanted.std()).item(),
            max(0.0, kl_div(logs, likely, reduction="batchmean", log_target=True).item()),
            abs(losses[0] - losses[1]),
        )

    def within(self, logits: float, divergence: float) -> bool:
        """Whether both are finite and within the limits."""
        return self.logits <= logits and self.divergence <= divergence

    def __str__(self) -> str:
        return f"largest error of a logit {self.logits:.2e} standard deviations, divergence {self.divergence:.2e} nats"


def gate_tokens(folder: str | Path, windows: str | Path, seed: int) -> Tensor:
    """Tokens of a gate (2, up to ``TOKENS``): the beginning of the first window of a corpus, and random ones."""
    text = load(windows)[0][:1, :TOKENS]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(shape_from_folder(folder).vocabulary, text.shape, generator=generator)
    return torch.cat([text, drawn])


@torch.no_grad()
def streamed_logits(
    folder: str | Path, windows: Tensor, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Tensor:
    """Logits (windows, tokens, vocabulary) of a canonical folder as quantgrid runs it.

    ``layers``: only the first ones.
    """
    model = streamed(FullPrecision(folder, dtype, layers=layers))
    return head_of(model)(final_states(model, windows, len(windows)))


@torch.no_grad()
def own_logits(folder: str | Path, windows: Tensor, layers: int | None = None) -> Tensor:
    """Logits of the model of a folder as transformers loads and runs it, in float32.

    Independent of quantgrid's reading of tensors, modules and layers. Of a multimodal checkpoint
    transformers loads the text decoder, by its own mapping of keys, from the prefix in config.json.
    """
    return _own_model(Path(folder), layers).eval()(windows, use_cache=False).logits


def _own_model(folder: Path, layers: int | None) -> nn.Module:
    """transformers' own model in float32.

    It is read as stored and widened one tensor after the other, since transformers joins experts while
    it reads. Buffers are those of a float32 model: some are rounded where they are computed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = first_layers(read_json(folder / "config.json"), layers)
    prefix = prefix_of(config)
    config = {key: value for key, value in config.items() if key not in (PREFIX, STACKED)}
    names = ("model.", END_ROLES["lm_head"]) if prefix else ()
    types = {tensor["dtype"] for tensor in tensor_headers(weight_files(folder)).values()}
    stored = AutoModelForCausalLM.from_pretrained(
        folder,
        config=AutoConfig.for_model(**config),
        key_mapping={f"^{re.escape(in_files(name, prefix))}": name for name in names} or None,
        dtype=_HALF.get(*types, torch.float32) if len(types) == 1 else torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for parameter in stored.parameters():
        parameter.data = parameter.data.float()
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict(stored.state_dict(), assign=True)
    return model


@torch.no_grad()
def transformed_logits(
    decoder: DecoderFolder,
    transform: Transform,
    windows: Tensor,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Logits of the transformed model in float32, folded in float64, with nothing rounded or clipped."""
    ends = folded_ends(transform, decoder, torch.float32)
    config = {**decoder.config, "tie_word_embeddings": "lm_head" not in ends}
    named = {END_ROLES[role]: tensor for role, tensor in ends.items()}
    model = skeleton(config, named, decoder.folder, torch.float32, "cpu")
    hidden, arguments = layer_inputs(model, windows)
    for index in progress(range(decoder.shape.layers)):
        layer = decoder.layer(index)
        transform.fold_layer(layer)
        module, model.model.layers[index] = model.model.layers[index], None
        running = RunningLayer(module, layer, {}, Sequential(windows))
        advance(running.module, hidden, arguments[index], len(windows))
    return head_of(model)(model.model.norm(hidden))


def check_model(model: str, folder: str | Path, windows: Tensor, layers: int | None = None) -> dict[str, Any]:
    """Agreement of the streamed model with transformers' own, or :class:`ConfigError`.

    ``windows`` (count, tokens); ``layers``: compare the first ones only (a model larger than memory).
    """
    found = Agreement.of(streamed_logits(folder, windows, layers=layers), own_logits(folder, windows, layers), windows)
    if not (found.within(LOGITS, float("inf")) and found.loss <= LOSS):
        raise ConfigError(
            f"models.{model}: quantgrid runs this model differently from transformers ({found}, loss off by "
            f"{found.loss:.2e} nats; accepted: {LOGITS:g} and {LOSS:g}); it is not quantized. Please report it with "
            "the name of the model"
        )
    return {**asdict(found), "layers": layers}


def check_transform(
    model: str,
    name: str,
    decoder: DecoderFolder,
    transform: Transform,
    windows: Tensor,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Agreement of the transformed, unrounded model with the model, or :class:`ConfigError`.

    A difference above the limits is accepted if it is at most ``NOISE`` times that between the
    untransformed model in float32 and in float64.
    """
    wanted = streamed_logits(decoder.folder, windows)
    found = Agreement.of(transformed_logits(decoder, transform, windows, progress), wanted, windows)
    if found.within(LOGITS, DIVERGENCE):
        return asdict(found)
    noise = Agreement.of(wanted, streamed_logits(decoder.folder, windows, torch.float64), windows)
    limits = max(LOGITS, NOISE * noise.logits), max(DIVERGENCE, NOISE * noise.divergence)
    if not found.within(*limits):
        raise ConfigError(
            f"transforms.{name} changes the function of {model} before anything is rounded: {found} (accepted: "
            f"{limits[0]:.1e} and {limits[1]:.1e}); no cell of it is quantized"
        )
    return {**asdict(found), "noise": asdict(noise)}
