"""One cell by llm-compressor, as ``grid.py`` times it, from the model's folder to its losses; runs
in the peers' environment, ``.venv-peers``.

Weights in INT4, symmetric, groups of ``--group-size``, all linears but lm_head, float32. Transforms
are llm-compressor's SmoothQuant and its SpinQuant with the rotations that quantgrid's
``random_hadamard`` has (R1, R2, R4); mitigations its round to nearest and its GPTQ. The quantized
model is evaluated where it lies in memory, by quantgrid's own ``evaluate``; before that its weights
are rounded once and for all, which llm-compressor's model would do anew in every forward pass.
Prints the seconds of both as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from copy import deepcopy
from pathlib import Path

BEGUN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform import SmoothQuantModifier, SpinQuantModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from turns import solver_options  # noqa: E402

from quantgrid.evaluation.perplexity import evaluate  # noqa: E402
from quantgrid.models.lm_head import head_of  # noqa: E402

TRANSFORMS = {
    "none": list,
    "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.5)],
    "hadamard": lambda: [SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard")],
}
MITIGATIONS = {
    "rtn": lambda settings, damping: QuantizationModifier(**settings),
    "gptq": lambda settings, damping: GPTQModifier(**settings, dampening_frac=damping, actorder=None),
}


def quantize(model: torch.nn.Module, options) -> None:
    """``model`` by the recipe of one cell, in place; calibrated on the windows where a modifier of
    it asks for data."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=options.group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = [
        *TRANSFORMS[options.transform](),
        MITIGATIONS[options.mitigation]({"config_groups": groups, "ignore": ["lm_head"]}, options.damping),
    ]
    data = {}
    if options.transform == "smoothquant" or options.mitigation == "gptq":
        windows = load_file(options.windows)["windows"].long()
        examples = Dataset.from_dict(
            {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        )
        data = {
            "dataset": examples,
            "num_calibration_samples": len(windows),
            "max_seq_length": windows.shape[1],
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, tokenizer=options.model, recipe=recipe, **data)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight.data = fake_quantize(
                module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
            )
            module.quantization_enabled = False


def main() -> None:
    parser = solver_options(
        __doc__.splitlines()[0], "model", "windows", "evaluation", "reference", "batch", "transform", "mitigation"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    head = deepcopy(head_of(model))
    quantize(model, options)
    quantized = time.perf_counter()
    reference = load_file(options.reference)["hidden"]
    windows = load_file(options.evaluation)["windows"][: len(reference)].long()
    losses = evaluate(model, windows, reference, lambda: head, int(options.batch))["negative_log_likelihood"]
    print(
        json.dumps(
            {
                "quantization": quantized - BEGUN,
                "evaluation": time.perf_counter() - quantized,
                "loss": sum(losses) / len(losses),
            }
        )
    )


if __name__ == "__main__":
    main()
