"""GPTQModel's GPTQ of a model folder on the CPU, as timed by ``gptq.py``; runs in a separate
environment, ``.venv-gptqmodel``.

The same work as that of ``gptq_oneshot.py``: INT4, symmetric, groups of ``--group-size``, all
linears but lm_head, float32, calibrated on the windows that quantgrid calibrates on, the columns in
order, the same damping. Writes the packed model to ``--output`` and prints its seconds as JSON.
"""

from __future__ import annotations

import json
import os
import time

BEGUN = time.perf_counter()
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# one, its own choice on two cores, is refused by its pool of threads
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from turns import solver_options  # noqa: E402


def main() -> None:
    options = solver_options(__doc__.splitlines()[0], "model", "windows", "output").parse_args()
    torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    windows = load_file(options.windows)["windows"].long()
    examples = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in windows]
    config = QuantizeConfig(
        bits=4,
        group_size=options.group_size,
        sym=True,
        desc_act=False,
        act_group_aware=False,
        damp_percent=options.damping,
        device="cpu",
        offload_to_disk=False,
    )
    folder, output = os.path.abspath(options.model), os.path.abspath(options.output)
    os.chdir(os.path.dirname(output))  # it leaves a log where it runs
    model = GPTQModel.load(folder, config, dtype=torch.float32)
    rounded = model.quantize(examples, batch_size=1)
    model.save(output)
    linears = sum(len(logs) for logs in rounded.values())
    print(json.dumps({"imports": imported - BEGUN, "seconds": time.perf_counter() - imported, "linears": linears}))


if __name__ == "__main__":
    main()
