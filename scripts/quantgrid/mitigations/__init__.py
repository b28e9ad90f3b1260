"""Step two: quantization error mitigations. One file per method, all of one signature."""
