"""quantgrid: pre-quantization transforms x error mitigations x granularities x formats, measured alike."""
