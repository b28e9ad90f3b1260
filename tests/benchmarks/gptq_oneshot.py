"""llm-compressor's one-shot GPTQ of a model folder, as ``gptq.py`` times it; runs in the peers'
environment, ``.venv-peers``.

INT4, symmetric, groups of ``--group-size``, all linears but lm_head, float32, calibrated on the
windows that quantgrid calibrates on; the columns in order and the damping that quantgrid's ``gptq``
has by default. Writes the packed model to ``--output`` and prints its seconds as JSON.
"""

from __future__ import annotations

import json
import time

BEGUN = time.perf_counter()

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from turns import solver_options  # noqa: E402


def recipe(group_size: int, damping: float) -> GPTQModifier:
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=damping, actorder=None)


def main() -> None:
    options = solver_options(__doc__.splitlines()[0], "model", "windows", "output").parse_args()
    torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    windows = load_file(options.windows)["windows"].long()
    dataset = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    oneshot(
        model=model,
        tokenizer=options.model,
        dataset=dataset,
        recipe=recipe(options.group_size, options.damping),
        output_dir=options.output,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    rounded = sum(hasattr(module, "quantization_scheme") for module in model.modules())
    print(json.dumps({"imports": imported - BEGUN, "seconds": time.perf_counter() - imported, "linears": rounded}))


if __name__ == "__main__":
    main()
