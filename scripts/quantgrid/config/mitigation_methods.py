"""The mitigations that exist: name -> module, options, capabilities, costs."""

from __future__ import annotations

from dataclasses import replace

from ..mitigations import defaults
from .methods import Method
from .options import Option
from .training_options import ERROR, WINDOWS, training

METRICS = ("plain", "lqer", "qera_approx", "qera_exact")
PROPAGATION = {
    "propagation": Option("cached", choices=("cached", "sequential")),
    "quantized_activations": Option(False, needs=((None, "propagation", ("sequential",)),)),
}
SOLVER = {"damping": Option(defaults.DAMPING, minimum=0.0), "block_size": Option(defaults.BLOCK_SIZE, minimum=1)}
COLUMNS = {
    "activation_order": Option(False, needs=((True, "scales", ("static",)),)),
    "scales": Option(defaults.SCALES, choices=("static", "running")),
}
GPTQ = {**SOLVER, **COLUMNS, **PROPAGATION}
SEQUENTIAL = {"propagation": Option("sequential", choices=("sequential",))}
RANK = {"rank": Option(defaults.RANK, minimum=0, share=True)}
# part of the scheme: no function of a mitigation takes it
RANGE = {"weight_range": Option("format", choices=("format", "mse"))}
METRIC = {"metric": Option(defaults.METRIC, choices=METRICS)}
BRANCH = {
    "factors": Option(defaults.FACTORS, choices=("bf16", "fp8", "int8", "int4")),
    "branch_input": Option(defaults.BRANCH_INPUT, choices=("quantized", "unquantized")),
}


def _on(*bases: str) -> dict[str, Option]:
    """The option ``base``, its first name the default, with the options of GPTQ that the bases
    which have them take."""
    solvers, ordered = (
        tuple(base for base in bases if base in some) for some in (("gptq", "mr_gptq", "gptaq"), ("gptq", "gptaq"))
    )
    return {
        "base": Option(bases[0], choices=bases, needs=(("gptaq", "propagation", ("sequential",)),)),
        **{name: replace(option, needs=(*option.needs, (None, "base", solvers))) for name, option in SOLVER.items()},
        **{name: replace(option, needs=(*option.needs, (None, "base", ordered))) for name, option in COLUMNS.items()},
        **PROPAGATION,
    }


def _trained_from(*bases: str) -> dict[str, Option]:
    """The options of :func:`_on` for what trains from a base: it has no propagation."""
    return {name: option for name, option in _on(*bases).items() if name not in PROPAGATION}


def _descent(steps: int, batch_size: int, rate: float, divided_by: str = "") -> dict[str, Option]:
    """The options of a training whose parameters all have one learning rate, which is not 0."""
    return {**training(steps, batch_size), "learning_rate": Option(rate, above=0.0, divided_by=divided_by)}


MITIGATIONS: dict[str, Method] = {
    "none": Method(
        "mitigations.methods.none", "nothing is quantized; for the format bf16 only", reads_statistics=False
    ),
    "rtn": Method("mitigations.methods.rtn", "round to nearest", RANGE, shares_scales=True, reads_statistics=False),
    "gptq": Method(
        "mitigations.methods.gptq",
        "GPTQ: rounding errors offset by the columns not yet rounded",
        {**GPTQ, **RANGE},
        costs=("solve",),
        shares_scales=True,
    ),
    "mr_gptq": Method(
        "mitigations.methods.mr_gptq",
        "MR-GPTQ: GPTQ in activation order, block scales of float formats searched",
        {**SOLVER, "block_scales": Option(defaults.BLOCK_SCALES, choices=("mse", "minmax")), **PROPAGATION},
        costs=("solve",),
        shares_scales=True,
    ),
    "gptaq": Method(
        "mitigations.methods.gptaq",
        "GPTAQ: GPTQ towards the full-precision output; sequential only",
        {
            **GPTQ,
            **RANGE,
            "alpha": Option(defaults.GPTAQ_ALPHA, minimum=0.0),
            **SEQUENTIAL,
        },
        costs=("solve",),
        shares_scales=True,
        paired=True,
    ),
    "qep": Method(
        "mitigations.methods.qep",
        "QEP: weights corrected for the error of their inputs, then rounded; sequential only",
        {
            "correction": Option(defaults.CORRECTION, minimum=0.0, maximum=1.0),
            "correction_damping": Option(defaults.CORRECTION_DAMPING, minimum=0.0),
            **_on("gptq", "mr_gptq", "rtn"),
            **RANGE,
            **SEQUENTIAL,
        },
        costs=("solve",),
        shares_scales=True,
        paired=True,
    ),
    "qronos": Method(
        "mitigations.methods.qronos",
        "Qronos: codes that minimize the output error on the inputs behind quantized layers; sequential only",
        {**SOLVER, "activation_order": Option(True), **PROPAGATION, **RANGE, **SEQUENTIAL},
        costs=("solve",),
        shares_scales=True,
        paired=True,
    ),
    "low_rank": Method(
        "mitigations.methods.low_rank",
        "round to nearest, and a low-rank term for its error",
        {**RANK, **METRIC, **BRANCH, **PROPAGATION, **RANGE},
        costs=("decompose",),
        shares_scales=True,
    ),
    "gptq_low_rank": Method(
        "mitigations.methods.gptq_low_rank",
        "GPTQ, and a low-rank term for its error",
        {**RANK, **METRIC, **BRANCH, **_on("gptq", "mr_gptq", "gptaq"), **RANGE},
        costs=("decompose",),
        shares_scales=True,
    ),
    "low_rank_first": Method(
        "mitigations.methods.low_rank_first",
        "SVDQuant: the leading part of the weight kept in 16 bits, the rest rounded",
        {
            **RANK,
            **METRIC,
            **BRANCH,
            **_on("rtn", "gptq", "mr_gptq", "gptaq"),
            "iterations": Option(defaults.SVDQUANT_ITERATIONS, minimum=1),
        },
        costs=("decompose",),
    ),
    "caldera": Method(
        "mitigations.methods.caldera",
        "CALDERA: codes and a low-rank term fitted in turns",
        {
            **RANK,
            **BRANCH,
            **_on("gptq", "mr_gptq", "gptaq", "rtn"),
            "iterations": Option(defaults.CALDERA_ITERATIONS, minimum=1),
        },
        costs=("solve", "decompose"),
    ),
    "sparse_outliers": Method(
        "mitigations.methods.sparse_outliers",
        "the weights of largest error kept in 16 bits, for the bytes of a rank",
        {**RANK, "metric": Option(defaults.METRIC, choices=METRICS[:3]), **_on("rtn", "gptq", "mr_gptq", "gptaq")},
        widest_input=65535,  # columns of outliers are stored in 16 bits
        shares_scales=True,
        keeps_outliers=True,
    ),
    "residual_columns": Method(
        "mitigations.methods.residual_columns",
        "SERQ: second codes for the columns of largest inputs, for the bytes of a rank",
        {
            **RANK,
            "order": Option(defaults.ORDER, choices=("maximum", "second_moment")),
            **_on("rtn", "gptq", "mr_gptq", "gptaq"),
        },
        widest_input=65535,
        shares_scales=True,
        keeps_outliers=True,
    ),
    "singular_domain": Method(
        "mitigations.methods.singular_domain",
        "round to nearest after a learned change of the singular values",
        {
            "steps": Option(defaults.SINGULAR_STEPS, minimum=0),
            "learning_rate": Option(defaults.SINGULAR_LEARNING_RATE, minimum=0.0),
            "bandwidth": Option(defaults.BANDWIDTH, minimum=0),
            **PROPAGATION,
        },
        costs=("decompose",),
    ),
    "tune_scales": Method(
        "mitigations.methods.tune_scales",
        "scales and zero points fine-tuned layer by layer (as OmniQuant's clipping)",
        {
            **_trained_from("rtn", "gptq", "mr_gptq"),
            "error": ERROR,
            **_descent(100, 4, 5e-3),
            **WINDOWS,
        },
        seeded=True,
        training="scales",
        fine_scales={"base": ("gptq", "mr_gptq")},
    ),
    "learned_rounding": Method(
        "mitigations.methods.learned_rounding",
        "SignRound: codes and ranges trained layer by layer by signed gradient descent (AutoRound)",
        {
            **_trained_from("rtn", "gptq"),
            "error": Option(
                "squared",
                choices=("squared", "relative", "trimmed", "fisher"),
                needs_some={"trimmed": ("trim_low", "trim_high")},
            ),
            # below a half each, so that some errors are left
            "trim_low": Option(0.0, minimum=0.0, below=0.5, needs=((None, "error", ("trimmed",)),)),
            "trim_high": Option(0.001, minimum=0.0, below=0.5, needs=((None, "error", ("trimmed",)),)),
            "ranges": Option(True),
            **_descent(200, 8, 1.0, divided_by="steps"),
            "schedule": Option("linear", choices=("cosine", "linear")),
            **WINDOWS,
        },
        seeded=True,
        training="codes",
        sensitive={"error": ("fisher",)},
    ),
    "qat_finetune": Method(
        "mitigations.methods.qat_finetune",
        "quantization-aware training of the weights, end to end, then rounded (QAD, RoSTE)",
        {
            **_trained_from("rtn", "gptq", "mr_gptq"),
            "loss": Option("kl", choices=("kl", "cross_entropy")),
            "weight_decay": Option(0.0, minimum=0.0),
            "warmup": Option(0.0, minimum=0.0, maximum=0.9),
            "checks": Option(1, minimum=1, at_most="steps"),
            **_descent(100, 4, 1e-5),
            **WINDOWS,
        },
        seeded=True,
        training="weights",
    ),
    "distill_blocks": Method(
        "mitigations.methods.distill_blocks",
        "weights trained layer by layer on the output of the full-precision layer, then rounded (block-wise QAD)",
        {
            **_trained_from("rtn", "gptq", "mr_gptq"),
            "error": ERROR,
            "weight_decay": Option(0.0, minimum=0.0),
            "warmup": Option(0.0, minimum=0.0, maximum=0.9),
            **_descent(100, 4, 1e-5),
            **WINDOWS,
        },
        seeded=True,
        training="weights",
    ),
}
