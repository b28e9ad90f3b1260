"""Style of results: one matplotlib style, one palette, and the labels of metrics, axes and values.

The palette is Okabe & Ito's (colour-blind safe, 2008) without its yellow, which has too little
contrast on white; every series also has a distinct marker. Figures are byte-reproducible: ids in
SVG come from a fixed salt, text stays text, and no file contains a date or a version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import deployments
from ..config.cells import FULL_PRECISION
from ..schemes import PRESETS

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")
INK, MUTED, GRID, EMPTY = "#222222", "#666666", "#DDDDDD", "#EAEAEA"
HEATMAP = "Blues"
WIDTH, HEIGHT, DPI = 7.0, 3.6, 200
TALLEST = 1.45  # largest height of a figure of many rows, as a multiple of its width
CONFIDENCE = 1.96  # standard errors on each side of a 95 % interval

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 7.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.size": 0,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": "white",
    "savefig.dpi": DPI,
    "svg.fonttype": "none",
    "svg.hashsalt": "quantgrid",
    "pdf.fonttype": 42,
}

METADATA = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Metric:
    """A metric's label, its unit (empty: none), its better direction ('lower', 'higher', or '' for
    neither), and whether it already compares with full precision."""

    label: str
    unit: str = ""
    better: str = ""
    relative: bool = False

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑"}.get(self.better, "")


METRICS = {
    "perplexity": Metric("perplexity", "", "lower"),
    "negative_log_likelihood": Metric("negative log-likelihood", "nats/token", "lower"),
    "kl_divergence": Metric("KL divergence to full precision", "nats/token", "lower", relative=True),
    "accuracy": Metric("accuracy", "", "higher"),
    "mean_accuracy": Metric("mean accuracy", "", "higher"),
    "bits_per_weight": Metric("bits per weight"),
    "stored_bits_per_weight": Metric("stored bits per weight"),
    "weight_sqnr_db": Metric("weight SQNR", "dB", "higher", relative=True),
    "output_sqnr_db": Metric("output SQNR, weights rounded", "dB", "higher", relative=True),
    "joint_output_sqnr_db": Metric("output SQNR, weights and activations rounded", "dB", "higher", relative=True),
    "residual_error": Metric("relative error of the last residual stream", "", "lower", relative=True),
    "online_operations_per_token": Metric("online operations per token"),
    "added_parameters": Metric("parameters of online operations and new biases"),
    "added_bits_per_weight": Metric("stored bits per weight of online operations, new biases and fixed ranges"),
    "untied_parameters": Metric("parameters of an untied lm_head"),
    "predicted_kl_divergence": Metric(
        "KL divergence predicted by the allocation", "nats/token", "lower", relative=True
    ),
    "training_steps": Metric("training steps"),
    "expert_tokens_smallest": Metric("fewest calibration tokens of an expert", "tokens/channel"),
    "expert_tokens_median": Metric("median calibration tokens of an expert", "tokens/channel"),
    "experts_below_width": Metric("share of experts with fewer calibration tokens than channels"),
}

LABELS = {
    ("transform", "none"): "no transform",
    ("mitigation", "none"): "not rounded",
    ("mitigation", "rtn"): "RTN",
    ("mitigation", "gptq"): "GPTQ",
    ("mitigation", "gptq-low-rank"): "GPTQ + low-rank",
    ("granularity", "-"): "–",
}
ACRONYMS = ("int", "mxfp", "nvfp", "fp", "bf", "nf", "mxint")


def metric(name: str) -> Metric:
    """Look up a metric in ``METRICS``; an unknown metric gets its name as label and no better
    direction."""
    return METRICS.get(name) or Metric(name.replace("_", " "))


def metric_label(name: str, dataset: str = "") -> str:
    """Format a metric for an axis or a caption: ``perplexity, wikitext2`` or ``weight SQNR
    (dB)``."""
    found = metric(name)
    unit = f" ({found.unit})" if found.unit else ""
    return f"{found.label}{unit}" + (f", {dataset}" if dataset else "")


def value_label(axis: str, value: str) -> str:
    """Format an axis value for readers: from ``LABELS``, presets of formats with their bits
    (``W4A4 INT4``), others as in the config."""
    if axis == "format" and value in PRESETS:
        return format_label(value, deployments.bits({}, value, "channel").label)
    return LABELS.get((axis, value.replace("_", "-")), value)


def format_label(name: str, bits: str) -> str:
    """Format a format with its ``bits``: ``W4A4 INT4``, ``W4A16 g64``, ``W4A4 int4-mse``; full precision
    is ``BF16``."""
    stem = name.upper() if name.rstrip("0123456789") in ACRONYMS else name
    if name == FULL_PRECISION:
        return stem
    rest = name[len(bits) :].lstrip("_-") if name.lower().startswith(bits.lower()) else stem
    return f"{bits} {rest}".strip()


def recipe_label(axes: Mapping[str, str], formats: Mapping[str, Any]) -> str:
    """Format a cell as ``W4A4 INT4 group-64 hadamard + GPTQ`` or ``W4A16 g64 GPTQ``.

    ``formats`` are the entries of the config; ``axes`` has the names on the five axes. The granularity is
    that of the weights, also where the format sets it. A format that names its groups (``w4a16_g64``)
    does not repeat them. Raises :class:`ConfigError` for an unknown format.
    """
    method = [value_label("transform", axes["transform"])] * (axes["transform"] != "none")
    method.append(value_label("mitigation", axes["mitigation"]))
    bits = deployments.bits(formats, axes["format"], axes["granularity"])
    label, granularity = format_label(axes["format"], bits.label), bits.granularity or axes["granularity"]
    named = label.endswith(f" g{granularity.removeprefix('group-')}")
    return " ".join([label, *([] if named or granularity == "-" else [granularity]), " + ".join(method)])


def row_height(wanted: float, least: float, rows: int, width: float) -> float:
    """Height of one of ``rows`` rows of panels, inches: ``wanted``, or less where the figure would be taller
    than ``TALLEST`` times its width, but no less than ``least``."""
    return min(wanted, max(least, TALLEST * width / max(1, rows)))


def significant(value: float, digits: int = 3) -> str:
    """Round ``value`` to significant digits, as a power of ten if it is very large or small:
    ``8.41``, ``1230``, ``2.30×10⁶``."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if value and not -4 <= int(exponent) < 5:
        return f"{mantissa}×10{superscript(int(exponent))}"
    decimals = digits - 1 - int(exponent) if value else 0
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def with_error(value: float, stderr: float) -> str:
    """Format ``value ± stderr``, both to the place of the second significant digit of ``stderr``;
    four digits without an error (NaN or 0)."""
    if not stderr > 0:
        return significant(value, 4)
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    exponent = 0 if -4 <= exponent < 5 else exponent
    value, stderr = value / 10.0**exponent, stderr / 10.0**exponent
    decimals = 1 - int(f"{stderr:.1e}".split("e")[1])
    text = " ± ".join(f"{round(number, decimals):.{max(decimals, 0)}f}" for number in (value, stderr))
    return f"({text})×10{superscript(exponent)}" if exponent else text


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
