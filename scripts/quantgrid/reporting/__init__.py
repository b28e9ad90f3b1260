"""Records of studies -> tables, figures and the report. Nothing here imports torch."""
