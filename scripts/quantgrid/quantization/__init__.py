"""Quantization of a model to packed codes, with the errors and costs of the result."""
