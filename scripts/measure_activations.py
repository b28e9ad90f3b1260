"""Measure kurtosis and peak-to-median ratio of a model's activations by site, as reported in the
cards of the reference models."""

import argparse
from pathlib import Path

import torch

from quantgrid.jobs.job import run
from quantgrid.reference import measuring
from quantgrid.reference.card import ACTIVATIONS, activations_table
from quantgrid.reference.family import FAMILY, SMALLEST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="config.json, weights and tokenizer: of models/, or of results/models/ after a run"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    windows = measuring.part("calibration", given.folder, FAMILY[SMALLEST].training.window)
    print(ACTIVATIONS, activations_table(measuring.activations(given.folder, windows)), sep="\n")


if __name__ == "__main__":
    run(main)
