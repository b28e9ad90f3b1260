"""Losses and logits of an exported folder in another environment, run as a script by its Python.

``python gptqmodel_probe.py REQUEST``: REQUEST is a JSON file with ``folder``, ``dtype``, ``code`` (which
defines ``model``), ``tokens`` (safetensors with ``windows`` and ``compared``) and ``result`` (a folder
for ``losses.json`` and ``logits.safetensors``). It imports nothing of quantgrid, which that
environment lacks.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(request: dict) -> None:
    given = {"folder": request["folder"], "dtype": getattr(torch, request["dtype"])}
    exec(request["code"], given)
    model, tokens, result = given["model"].eval(), load_file(request["tokens"]), Path(request["result"])
    losses = []
    for window in tokens["windows"]:
        logs = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-logs.gather(-1, window[1:, None]).double().mean().item())
    logits = torch.stack([model(window[None]).logits[0].float() for window in tokens["compared"]])
    modules = sorted({type(module).__module__.partition(".")[0] for module in model.modules()})
    save_file({"logits": logits}, result / "logits.safetensors")
    (result / "losses.json").write_text(json.dumps({"losses": losses, "modules": modules}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
