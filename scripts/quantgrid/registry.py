"""What exists, as data: method name -> module, options, capabilities. Standard library only.

A job imports the module of its own method and no other. A new method is one file in its folder, one line here and one entry
in a config. The code hash behind every path never covers this file, so that a new line reruns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from .errors import ConfigError, unknown_name
from .methods import Method, Option

SITE_NAMES = ("attention_input", "output_input", "mlp_input", "down_input")
ALL_SITES = Option(list(SITE_NAMES), choices=SITE_NAMES)
SCALING_SITES = Option(["attention_input", "mlp_input"], choices=SITE_NAMES)
STATISTIC = ("maximum", "mean", "rms")
CENTER = Option("median", choices=("median", "mean", "midrange"))
SHIFTED_SITES = Option(list(SITE_NAMES[:3]), choices=SITE_NAMES)  # its mean costs accuracy at down_input (docs/transforms.md)
ROTATIONS = {"rotations": Option(["R1", "R2", "R4"], choices=("R1", "R2", "R4")), "basis": Option("none", choices=("none", "activations", "weights"))}
HADAMARD = ("hidden_size", "head_dim", "intermediate_size")
LEARNED = {"seeded": True, "learned": True}
ON_WINDOWS = {**LEARNED, "fitted_to_scheme": True, "trained_on_windows": True}
ERROR = Option("squared", choices=("squared", "relative"))
OBJECTIVE = {"objective": Option("end_to_end", choices=("end_to_end", "layer_wise")), "top": Option(1000, minimum=1), "round_weights": Option(False)}
LOSSES = ("cross_entropy", "kl_top")
METRICS = ("plain", "lqer", "qera_approx", "qera_exact")
PROPAGATION = {"propagation": Option("cached", choices=("cached", "sequential")),
               "quantized_activations": Option(False, needs=((None, "propagation", ("sequential",)),))}
SOLVER = {"damping": Option(0.01, minimum=0.0), "block_size": Option(128, minimum=1)}
COLUMNS = {"activation_order": Option(False, needs=((True, "scales", ("static",)),)), "scales": Option("static", choices=("static", "running"))}
GPTQ = {**SOLVER, **COLUMNS, **PROPAGATION}
RANK = {"rank": Option(32, minimum=0, share=True)}
RANGE = {"weight_range": Option("format", choices=("format", "mse"))}  # part of the scheme: no function of a mitigation takes it
METRIC = {"metric": Option("plain", choices=METRICS)}
BRANCH = {"factors": Option("bf16", choices=("bf16", "fp8", "int8", "int4")),
          "branch_input": Option("quantized", choices=("quantized", "unquantized"))}


def training(steps: int, batch_size: int, **rates: float) -> dict[str, Option]:
    """Options of every learned transform; ``steps`` of all parameters together or, where layers are trained one by one, of each layer."""
    return {"steps": Option(steps, minimum=0), "batch_size": Option(batch_size, minimum=1),
            "schedule": Option("cosine", choices=("cosine", "linear")),
            **{name: Option(rate, minimum=0.0) for name, rate in rates.items()}}


# Of what is trained on windows: how many of them, the last, are kept for the comparison of start and end; the gradient of rounding.
WINDOWS = {"held_out": Option(16, minimum=16), "gradient": Option("range", choices=("range", "identity"))}


def _on(*bases: str) -> dict[str, Option]:
    """The option ``base``, its first name the default, with the options of GPTQ that the bases which have them take."""
    solvers, ordered = (tuple(base for base in bases if base in some) for some in (("gptq", "mr_gptq", "gptaq"), ("gptq", "gptaq")))
    return {"base": Option(bases[0], choices=bases, needs=(("gptaq", "propagation", ("sequential",)),)),
            **{name: replace(option, needs=(*option.needs, (None, "base", solvers))) for name, option in SOLVER.items()},
            **{name: replace(option, needs=(*option.needs, (None, "base", ordered))) for name, option in COLUMNS.items()}, **PROPAGATION}


TRANSFORMS: dict[str, Method] = {
    "none": Method("transforms.none", "the model as it is"),
    "fold_norms": Method("transforms.fold_norms", "norm gains folded into the linears behind them: what R1 does before it rotates"),
    "shifting": Method("transforms.shifting", "channels centred, online where no bias can take it (Outlier Suppression+)",
                       {"center": CENTER, "sites": SHIFTED_SITES}, calibrated=True),
    "scaling": Method("transforms.scaling", "SmoothQuant: channels scaled between activation and weight",
                      {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "sites": SCALING_SITES, "statistic": Option("maximum", choices=STATISTIC),
                       "search": Option(False), "points": Option(21, minimum=2), "round_activations": Option(True)},
                      calibrated=True, fitted_to_scheme={"search": (True,)}),
    "awq": Method("transforms.awq", "AWQ: scaling by a searched power of the mean magnitude",
                  {"sites": ALL_SITES, "points": Option(20, minimum=1), "round_activations": Option(False), "clip": Option(False),
                   "clip_steps": Option(10, minimum=1)}, calibrated=True, fitted_to_scheme=True),
    "outlier_suppression_plus": Method("transforms.outlier_suppression_plus", "OS+: channels centred, scaled to a searched threshold",
                                       {"sites": ALL_SITES, "shifted_sites": SHIFTED_SITES, "center": CENTER, "points": Option(40, minimum=1),
                                        "lowest": Option(0.1, minimum=1e-6), "round_activations": Option(True)},
                                       calibrated=True, fitted_to_scheme=True),
    "random_hadamard": Method("transforms.random_hadamard", "randomized Hadamard rotations R1, R2 offline and R4 online (SpinQuant without learning)",
                              ROTATIONS, hadamard_of={"rotations": {"R1": "hidden_size", "R2": "head_dim", "R4": "intermediate_size"}},
                              instead="'scaling' or 'none', or leave it out of 'rotations',", calibrated={"basis": ("activations",)}, seeded=True),
    "random_orthogonal": Method("transforms.random_orthogonal", "Haar rotations R1, R2 offline, Hadamard R4 online",
                                {**ROTATIONS, "heads": Option("orthogonal", choices=("orthogonal", "hadamard"))},
                                hadamard_of={"rotations": {"R4": "intermediate_size"}, "heads": {"hadamard": "head_dim"}},
                                instead="'rotations' without R4 and 'heads: orthogonal'", calibrated={"basis": ("activations",)}, seeded=True),
    "quarot": Method("transforms.quarot", "QuaRot: random Hadamard rotations with the heads mixed online",
                     {"mixing": Option("hadamard", choices=("hadamard", "orthogonal"))}, hadamard=("hidden_size", "head_dim", "intermediate_size"),
                     hadamard_of={"mixing": {"hadamard": "heads"}},
                     instead="'random_hadamard', which mixes no heads, or 'mixing: orthogonal'", seeded=True),
    "block_hadamard": Method("transforms.block_hadamard", "Hadamard matrices on blocks of channels, online at every site (MR-GPTQ)",
                             {"block_size": Option(32, choices=(16, 32, 64, 128)), "sites": ALL_SITES, "fold_heads": Option(False)},
                             block="block_size"),
    "duquant": Method("transforms.duquant", "DuQuant: scaling, greedy block rotation, zigzag permutation, block rotation",
                      {"alpha": Option(0.6, minimum=0.0, maximum=1.0), "block_size": Option(128, minimum=2), "steps": Option(256, minimum=0),
                       "shared": Option(True), "sites": ALL_SITES}, block="block_size", calibrated=True, seeded=True),
    "reorder": Method("transforms.reordering", "channels in the order of their magnitude (Atom, without its INT8 channels)",
                      {"statistic": Option("rms", choices=STATISTIC), "sites": ALL_SITES, "heads": Option("across", choices=("across", "within"))},
                      calibrated=True),
    "rotation_then_scaling": Method("transforms.rotation_then_scaling", "random Hadamard rotations, then SmoothQuant scaling of the rotated model",
                                    {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "statistic": Option("maximum", choices=STATISTIC),
                                     "sites": Option(["attention_input", "mlp_input"], choices=SITE_NAMES[:3])},
                                    hadamard=HADAMARD, calibrated=True, seeded=True),
    "optimized_scaling": Method("transforms.optimized_scaling", "OmniQuant: channel scales and weight clipping learned layer by layer",
                                {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "error": ERROR,
                                 **training(400, 1, learning_rate=5e-3, clip_learning_rate=1e-2), **WINDOWS}, calibrated=True, **ON_WINDOWS),
    "optimized_rotation": Method("transforms.optimized_rotation", "SpinQuant: rotations R1, R2 learned, R4 a fixed Hadamard transform",
                                 {**OBJECTIVE, "loss": Option("cross_entropy", choices=LOSSES), **training(100, 8, learning_rate=0.1), **WINDOWS},
                                 hadamard=HADAMARD, **ON_WINDOWS),
    "optimized_rotation_scaling": Method("transforms.optimized_rotation_scaling", "OSTQuant: rotations and channel scales learned together",
                                         {**OBJECTIVE, "loss": Option("kl_top", choices=LOSSES),
                                          "basis": Option("weights", choices=("weights", "none")),
                                          **training(100, 8, learning_rate=0.1, scale_learning_rate=0.01), **WINDOWS},
                                         hadamard=HADAMARD, **ON_WINDOWS),
    "flatquant": Method("transforms.flatquant", "FlatQuant: Kronecker products, channel scales and weight clipping learned layer by layer",
                        {"alpha": Option(0.3, minimum=0.0, maximum=1.0), "error": ERROR,
                         "clip_activations": Option(True),
                         **training(480, 4, learning_rate=5e-3, clip_learning_rate=5e-2), **WINDOWS},
                        kronecker=("hidden_size", "intermediate_size"), calibrated=True, **ON_WINDOWS),
    "data_free_rotation": Method("transforms.data_free_rotation", "rotations R1, R2 learned from the weights alone, R4 a fixed Hadamard transform",
                                 {"goal": Option("minimize", choices=("minimize", "maximize")), **training(100, 4, learning_rate=0.2)},
                                 hadamard=HADAMARD, **LEARNED),
}

MITIGATIONS: dict[str, Method] = {
    "none": Method("mitigations.none", "nothing is quantized; for the format bf16 only"),
    "rtn": Method("mitigations.rtn", "round to nearest", RANGE),
    "gptq": Method("mitigations.gptq", "GPTQ: rounding errors offset by the columns not yet rounded", {**GPTQ, **RANGE}),
    "mr_gptq": Method("mitigations.mr_gptq", "MR-GPTQ: GPTQ in activation order, block scales of float formats searched",
                      {**SOLVER, "block_scales": Option("mse", choices=("mse", "minmax")), **PROPAGATION}),
    "gptaq": Method("mitigations.gptaq", "GPTAQ: GPTQ towards the full-precision output; sequential only",
                    {**GPTQ, **RANGE, "alpha": Option(0.25, minimum=0.0), "propagation": Option("sequential", choices=("sequential",))}),
    "low_rank": Method("mitigations.low_rank", "round to nearest, and a low-rank term for its error",
                       {**RANK, **METRIC, **BRANCH, **PROPAGATION, **RANGE}),
    "gptq_low_rank": Method("mitigations.gptq_low_rank", "GPTQ, and a low-rank term for its error",
                            {**RANK, **METRIC, **BRANCH, **_on("gptq", "mr_gptq", "gptaq"), **RANGE}),
    "low_rank_first": Method("mitigations.low_rank_first", "SVDQuant: the leading part of the weight kept in 16 bits, the rest rounded",
                             {**RANK, **METRIC, **BRANCH, **_on("rtn", "gptq", "mr_gptq", "gptaq"), "iterations": Option(100, minimum=1)}),
    "caldera": Method("mitigations.caldera", "CALDERA: codes and a low-rank term fitted in turns",
                      {**RANK, **BRANCH, **_on("gptq", "mr_gptq", "gptaq", "rtn"), "iterations": Option(20, minimum=1)}),
    "sparse_outliers": Method("mitigations.sparse_outliers", "the weights of largest error kept in 16 bits, for the bytes of a rank",
                              {**RANK, "metric": Option("plain", choices=METRICS[:3]), **_on("rtn", "gptq", "mr_gptq", "gptaq")},
                              widest_input=65535),  # columns of outliers are stored in 16 bits
    "singular_domain": Method("mitigations.singular_domain", "round to nearest after a learned change of the singular values",
                              {"steps": Option(50, minimum=0), "learning_rate": Option(0.002, minimum=0.0), "bandwidth": Option(1, minimum=0),
                               **PROPAGATION}),
    "finetune_blocks": Method("mitigations.finetune_blocks", "scales and zero points fine-tuned layer by layer (as OmniQuant's clipping)",
                              {**{name: option for name, option in _on("rtn", "gptq", "mr_gptq").items() if name not in PROPAGATION},
                               "error": ERROR, **training(100, 4, learning_rate=5e-3), **WINDOWS}, seeded=True, training="scales",
                              fine_scales={"base": ("gptq", "mr_gptq")}),
    "qat": Method("mitigations.qat", "quantization-aware fine-tuning of the weights, end to end, then round to nearest (RoSTE)",
                  {"loss": Option("kl", choices=("kl", "cross_entropy")), "weight_decay": Option(0.0, minimum=0.0),
                   **training(100, 4, learning_rate=1e-5), **WINDOWS}, seeded=True, training="weights"),
}

METHODS: dict[str, dict[str, Method]] = {"transforms": TRANSFORMS, "mitigations": MITIGATIONS}


def method(axis: str, name: str, where: str = "") -> Method:
    """The registered method ``name`` of ``axis`` (``transforms`` or ``mitigations``)."""
    if name not in METHODS[axis]:
        raise ConfigError(f"{where or axis}: {unknown_name('method', name, METHODS[axis])}")
    return METHODS[axis][name]


SEQUENTIAL = "propagation"  # the module that propagates; only cells that ask for it depend on it


def split_propagation(resolved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A resolved mitigation without the options that its function does not take, and how sequential propagation runs; None: cached.

    ``paired``: the unquantized model has to run beside, as GPTAQ asks for.
    """
    options = {name: value for name, value in resolved["options"].items() if name not in {*PROPAGATION, *RANGE}}
    own = {**resolved, "options": options}
    if resolved["options"].get("propagation") != "sequential":
        return own, None
    paired = "gptaq" in (resolved["method"], options.get("base"))
    return own, {"quantized_activations": resolved["options"]["quantized_activations"], "paired": paired}


def load(axis: str, name: str) -> ModuleType:
    """Import the module of one method."""
    return import_module(f"quantgrid.{method(axis, name).module}")
