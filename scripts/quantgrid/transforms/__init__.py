"""Pre-quantization transforms (step one of arXiv 2507.17417): primitives and recipes."""
