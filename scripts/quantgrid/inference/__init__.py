"""Forward pass of a quantized model: online operations, rounded inputs, keys, values and
linears."""
