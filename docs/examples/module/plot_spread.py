"""Perplexity of every quantized cell over its KL divergence to full precision, from results.csv."""

import csv
import sys

from matplotlib import pyplot

with open(sys.argv[1]) as file:
    rows = [row for row in csv.DictReader(file) if row["mitigation"] != "none"]
values = {
    metric: {row["cell"]: float(row["value"]) for row in rows if row["metric"] == metric}
    for metric in ("perplexity", "kl_divergence")
}
figure, axes = pyplot.subplots(layout="constrained")
axes.loglog([values["kl_divergence"][cell] for cell in values["perplexity"]], list(values["perplexity"].values()), "o")
axes.set(xlabel="KL divergence to full precision (nats/token)", ylabel="perplexity")
figure.savefig(sys.argv[2])
