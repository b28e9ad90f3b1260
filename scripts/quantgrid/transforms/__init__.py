"""Step one: pre-quantization transforms. One file per primitive (scale, rotate) and per recipe that composes primitives."""
