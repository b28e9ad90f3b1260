"""No mitigation and no quantization: marks the full-precision cells."""
