"""Columns of the CSV of losses that a training writes."""

COLUMNS = ("part", "step", "loss", "learning_rate")
HEADER = ",".join(COLUMNS) + "\n"  # the losses of a job without training
