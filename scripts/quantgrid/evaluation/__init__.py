"""Evaluation of a quantized model: perplexity, divergence, zero-shot tasks, residual error."""
