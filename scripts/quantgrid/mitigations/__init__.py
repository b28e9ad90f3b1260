"""Quantization error mitigations (step two of arXiv 2507.17417): methods and their shared
solvers."""
