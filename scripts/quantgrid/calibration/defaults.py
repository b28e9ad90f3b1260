"""Defaults of a calibration. Standard library only: the config states them too."""

SAMPLES = 256  # tokens in the sample of a site
SENSITIVITY_WINDOWS = 16  # windows of a calibration that sensitivities are measured on, at most
