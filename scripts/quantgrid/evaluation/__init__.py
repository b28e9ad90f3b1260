"""What a quantized model is worth: perplexity and divergence, zero-shot tasks, errors of its layers."""
