"""No mitigation, because nothing is quantized: marks the full-precision cells."""
