"""Export of a quantized cell to formats that other programs load, with a check of what they compute."""
