"""Train the language models shipped with quantgrid from scratch: text, tokenizer, weights, cards
(`make reference-models`)."""

import argparse
from pathlib import Path

import torch

from quantgrid.ground.errors import ConfigError, unknown_name
from quantgrid.jobs.job import progress, run
from quantgrid.models.folders import BUILTIN
from quantgrid.reference import text
from quantgrid.reference.family import FAMILY
from quantgrid.reference.publishing import publish
from quantgrid.reference.training import Trainer, monitored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(FAMILY)}; none: all")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch (the shipped weights: 1; others differ in the last bits)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("results-reference"), help="where tokenizer, tokens and states are kept"
    )
    parser.add_argument("--models-folder", type=Path, default=BUILTIN, help="where the models are written")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        if name not in FAMILY:
            raise ConfigError(unknown_name("reference model", name, FAMILY))
    tokens, about = text.prepare(given.work)
    for name in given.models or FAMILY:
        reference = FAMILY[name]
        trainer = Trainer(reference, given.work / f"{name}-{about['text_sha256'][:10]}.safetensors")
        windows = text.windows(tokens, reference.training.window)
        trainer.run(windows, monitored(given.work, reference.training.window), progress=progress(name))
        publish(name, trainer, given.work, about, windows, given.models_folder)


if __name__ == "__main__":
    run(main)
