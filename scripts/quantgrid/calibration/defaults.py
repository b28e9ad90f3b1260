"""Defaults of a calibration. Standard library only: the config states them too."""

SAMPLES = 256  # tokens in the sample of a site
