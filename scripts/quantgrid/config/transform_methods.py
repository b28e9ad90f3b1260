"""The transforms that exist: name -> module, options, capabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .methods import SITES_OF_OPTION, STREAM, Method, Online, Option
from .training_options import ERROR, WINDOWS, training

SITE_NAMES = ("attention_input", "output_input", "mlp_input", "down_input")
ALL_SITES = Option(list(SITE_NAMES), choices=SITE_NAMES)
SCALING_SITES = Option(["attention_input", "mlp_input"], choices=SITE_NAMES)
STATISTIC = ("maximum", "mean", "rms")
CENTER = Option("median", choices=("median", "mean", "midrange"))
# the mean of down_input costs accuracy (docs/transforms.md)
SHIFTED_SITES = Option(list(SITE_NAMES[:3]), choices=SITE_NAMES)
ROTATIONS = {
    "rotations": Option(["R1", "R2", "R4"], choices=("R1", "R2", "R4")),
    "basis": Option("none", choices=("none", "activations", "weights")),
}
# where the exact place of an operation is not in the weights: docs/models.md
RESIDUAL = Option("offline", choices=("offline", "online"))
DIVISION = Option("offline", choices=("offline", "online"))
HADAMARD = ("hidden_size", "head_dim", "intermediate_size")
ONLINE_R4 = Online("down_input", "hadamard", {"rotations": ("R4",)})
ALWAYS_R4 = Online("down_input", "hadamard")
SIGNED = Online(STREAM, "signed_hadamard", {"residual": ("online",)})
ROTATED = Online(STREAM, "block_rotate", {"residual": ("online",)})
LEARNED: dict[str, Any] = {"seeded": True, "learned": True}
ON_WINDOWS: dict[str, Any] = {**LEARNED, "fitted_to_scheme": True, "trained_on_windows": True}
OBJECTIVE = {
    "objective": Option("end_to_end", choices=("end_to_end", "layer_wise")),
    "top": Option(1000, minimum=1),
    "round_weights": Option(False),
}
LOSSES = ("cross_entropy", "kl_top")

TRANSFORMS: dict[str, Method] = {
    "none": Method("transforms.recipes.none", "the model as it is"),
    "fold_norms": Method(
        "transforms.recipes.fold_norms",
        "norm gains folded into the next linears (first step of R1)",
    ),
    "shifting": Method(
        "transforms.recipes.shifting",
        "channels centred, online where no bias can take it (Outlier Suppression+)",
        {"center": CENTER, "sites": SHIFTED_SITES},
        calibrated=True,
        shifts="sites",
    ),
    "scaling": Method(
        "transforms.recipes.scaling",
        "SmoothQuant: channels scaled between activation and weight",
        {
            "alpha": Option(0.5, minimum=0.0, maximum=1.0),
            "sites": SCALING_SITES,
            "statistic": Option("maximum", choices=STATISTIC),
            "search": Option(False),
            "points": Option(21, minimum=2),
            "round_activations": Option(True),
            "division": DIVISION,
        },
        calibrated=True,
        fitted_to_scheme={"search": (True,)},
        divides=SITE_NAMES,
    ),
    "awq": Method(
        "transforms.recipes.awq",
        "AWQ: scaling by a searched power of the mean magnitude",
        {
            "sites": ALL_SITES,
            "points": Option(20, minimum=1),
            "round_activations": Option(False),
            "clip": Option(False),
            "clip_steps": Option(10, minimum=1),
            "division": DIVISION,
        },
        calibrated=True,
        divides=SITE_NAMES,
        fitted_to_scheme=True,
    ),
    "outlier_suppression_plus": Method(
        "transforms.recipes.outlier_suppression_plus",
        "OS+: channels centred, scaled to a searched threshold",
        {
            "sites": ALL_SITES,
            "shifted_sites": SHIFTED_SITES,
            "center": CENTER,
            "points": Option(40, minimum=1),
            "lowest": Option(0.1, minimum=1e-6),
            "round_activations": Option(True),
            "division": DIVISION,
        },
        divides=SITE_NAMES,
        calibrated=True,
        fitted_to_scheme=True,
        shifts="shifted_sites",
    ),
    "random_hadamard": Method(
        "transforms.recipes.random_hadamard",
        "randomized Hadamard rotations R1, R2 offline, R4 online (SpinQuant unlearned)",
        {**ROTATIONS, "residual": RESIDUAL},
        hadamard_of={"rotations": {"R1": "hidden_size", "R2": "head_dim", "R4": "intermediate_size"}},
        instead="'scaling' or 'none', or leave it out of 'rotations',",
        calibrated={"basis": ("activations",)},
        seeded=True,
        online=(replace(SIGNED, when={"residual": ("online",), "rotations": ("R1",)}), ONLINE_R4),
    ),
    "random_orthogonal": Method(
        "transforms.recipes.random_orthogonal",
        "Haar rotations R1, R2 offline, Hadamard R4 online",
        {**ROTATIONS, "heads": Option("orthogonal", choices=("orthogonal", "hadamard")), "residual": RESIDUAL},
        hadamard_of={"rotations": {"R4": "intermediate_size"}, "heads": {"hadamard": "head_dim"}},
        instead="'rotations' without R4 and 'heads: orthogonal'",
        calibrated={"basis": ("activations",)},
        seeded=True,
        online=(replace(ROTATED, when={"residual": ("online",), "rotations": ("R1",)}), ONLINE_R4),
    ),
    "quarot": Method(
        "transforms.recipes.quarot",
        "QuaRot: random Hadamard rotations with the heads mixed online",
        {"mixing": Option("hadamard", choices=("hadamard", "orthogonal")), "residual": RESIDUAL},
        rotations=("R1", "R2", "R4"),
        hadamard=("hidden_size", "head_dim", "intermediate_size"),
        hadamard_of={"mixing": {"hadamard": "heads"}},
        instead="'random_hadamard', which mixes no heads, or 'mixing: orthogonal'",
        seeded=True,
        online=(
            SIGNED,
            Online("output_input", "head_hadamard", {"mixing": ("hadamard",)}),
            Online("output_input", "head_rotate", {"mixing": ("orthogonal",)}),
            ALWAYS_R4,
        ),
    ),
    "block_hadamard": Method(
        "transforms.recipes.block_hadamard",
        "Hadamard matrices on blocks of channels, online at every site (MR-GPTQ)",
        {"block_size": Option(32, choices=(16, 32, 64, 128)), "sites": ALL_SITES, "fold_heads": Option(False)},
        block="block_size",
        online=(Online(SITES_OF_OPTION, "block_hadamard", unless_heads="fold_heads"),),
    ),
    "duquant": Method(
        "transforms.recipes.duquant",
        "DuQuant: scaling, greedy block rotation, zigzag permutation, block rotation",
        {
            "alpha": Option(0.6, minimum=0.0, maximum=1.0),
            "block_size": Option(128, minimum=2),
            "steps": Option(256, minimum=0),
            "shared": Option(True),
            "sites": ALL_SITES,
            "division": DIVISION,
        },
        divides=SITE_NAMES,
        block="block_size",
        calibrated=True,
        seeded=True,
        online=(
            Online(SITES_OF_OPTION, "block_rotate"),
            Online(SITES_OF_OPTION, "gather"),
            Online(SITES_OF_OPTION, "block_rotate"),
        ),
    ),
    "reorder": Method(
        "transforms.recipes.reordering",
        "channels in the order of their magnitude (Atom, without its INT8 channels)",
        {
            "statistic": Option("rms", choices=STATISTIC),
            "sites": ALL_SITES,
            "heads": Option("across", choices=("across", "within")),
        },
        calibrated=True,
        online=(
            Online("attention_input", "gather", {"sites": ("attention_input",)}),
            Online("output_input", "gather", {"sites": ("output_input",), "heads": ("across",)}),
            Online("mlp_input", "gather", {"sites": ("mlp_input",)}),
        ),
    ),
    "rotation_then_scaling": Method(
        "transforms.recipes.rotation_then_scaling",
        "random Hadamard rotations, then SmoothQuant scaling",
        {
            "alpha": Option(0.5, minimum=0.0, maximum=1.0),
            "statistic": Option("maximum", choices=STATISTIC),
            "sites": Option(["attention_input", "mlp_input"], choices=SITE_NAMES[:3]),
            "residual": RESIDUAL,
        },
        rotations=("R1", "R2", "R4"),
        divides=SITE_NAMES,
        hadamard=HADAMARD,
        calibrated=True,
        seeded=True,
        online=(SIGNED, ALWAYS_R4),
    ),
    "optimized_scaling": Method(
        "transforms.recipes.optimized_scaling",
        "OmniQuant: channel scales and weight clipping learned layer by layer",
        {
            "alpha": Option(0.5, minimum=0.0, maximum=1.0),
            "error": ERROR,
            **training(400, 1, learning_rate=5e-3, clip_learning_rate=1e-2),
            **WINDOWS,
            "division": DIVISION,
        },
        divides=SITE_NAMES[:3],
        calibrated=True,
        **ON_WINDOWS,
    ),
    "optimized_rotation": Method(
        "transforms.recipes.optimized_rotation",
        "SpinQuant: rotations R1, R2 learned, R4 a fixed Hadamard transform",
        {
            **OBJECTIVE,
            "loss": Option("cross_entropy", choices=LOSSES),
            **training(100, 8, learning_rate=0.1),
            **WINDOWS,
            "residual": RESIDUAL,
        },
        rotations=("R1", "R2", "R4"),
        hadamard=HADAMARD,
        **ON_WINDOWS,
        online=(SIGNED, ROTATED, ALWAYS_R4),
    ),
    "optimized_rotation_scaling": Method(
        "transforms.recipes.optimized_rotation_scaling",
        "OSTQuant: rotations and channel scales learned together",
        {
            **OBJECTIVE,
            "loss": Option("kl_top", choices=LOSSES),
            "basis": Option("weights", choices=("weights", "none")),
            **training(100, 8, learning_rate=0.1, scale_learning_rate=0.01),
            **WINDOWS,
            "residual": RESIDUAL,
        },
        rotations=("R1", "R2", "R4"),
        divides=SITE_NAMES,
        hadamard=HADAMARD,
        **ON_WINDOWS,
        online=(
            replace(SIGNED, when={"residual": ("online",), "basis": ("none",)}),
            replace(ROTATED, when={"residual": ("online",), "basis": ("weights",)}),
            ROTATED,
            ALWAYS_R4,
        ),
    ),
    "flatquant": Method(
        "transforms.recipes.flatquant",
        "FlatQuant: Kronecker products, channel scales and weight clipping learned layer by layer",
        {
            "alpha": Option(0.3, minimum=0.0, maximum=1.0),
            "error": ERROR,
            "clip_activations": Option(True),
            **training(480, 4, learning_rate=5e-3, clip_learning_rate=5e-2),
            **WINDOWS,
            "division": DIVISION,
        },
        divides=("attention_input", "mlp_input", "down_input"),
        kronecker=("hidden_size", "intermediate_size"),
        calibrated=True,
        **ON_WINDOWS,
        online=(Online(SITES_OF_OPTION, "kronecker"),),
        clips={"clip_activations": (True,)},
    ),
    "data_free_rotation": Method(
        "transforms.recipes.data_free_rotation",
        "R1, R2 learned from the weights alone, R4 a fixed Hadamard transform",
        {
            "goal": Option("minimize", choices=("minimize", "maximize")),
            **training(100, 4, learning_rate=0.2),
            "residual": RESIDUAL,
        },
        rotations=("R1", "R2", "R4"),
        hadamard=HADAMARD,
        **LEARNED,
        online=(SIGNED, ROTATED, ALWAYS_R4),
    ),
}
