"""The transforms that are learned: name -> module, options, capabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .methods import SITES_OF_OPTION, Method, Online
from .options import Option
from .training_options import ERROR, WINDOWS, training
from .transform_options import (
    ALWAYS_R4,
    DIVISION,
    HADAMARD,
    RESIDUAL,
    ROTATED,
    SIGNED,
    SITE_NAMES,
    TURNED,
    TURNED_BLOCKS,
    WITHIN_HEADS,
)

LEARNED: dict[str, Any] = {"seeded": True, "learned": True}
ON_WINDOWS: dict[str, Any] = {**LEARNED, "fitted_to_scheme": True, "trained_on_windows": True}
OBJECTIVE = {
    "objective": Option("end_to_end", choices=("end_to_end", "layer_wise")),
    "top": Option(1000, minimum=1),
    "round_weights": Option(False),
}
LOSSES = ("cross_entropy", "kl_top")
STORED = ("kurtosis", "whip")  # objectives on stored activations, without the network
NETWORK = ((None, "objective", ("end_to_end", "layer_wise")),)

LEARNED_TRANSFORMS: dict[str, Method] = {
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
            **{name: replace(option, needs=NETWORK) for name, option in {**OBJECTIVE, **WINDOWS}.items()},
            "objective": Option("end_to_end", choices=("end_to_end", "layer_wise", *STORED)),
            "loss": Option("cross_entropy", choices=LOSSES, needs=NETWORK),
            **training(100, 8, learning_rate=0.1),
            "residual": RESIDUAL,
            "values": WITHIN_HEADS,
        },
        rotations=("R1", "R2", "R4"),
        hadamard=HADAMARD,
        calibrated={"objective": STORED},
        **{**ON_WINDOWS, "fitted_to_scheme": {"objective": ("end_to_end", "layer_wise")}},
        stored_tokens={"objective": dict.fromkeys(STORED, 4096)},
        online=(SIGNED, ROTATED, *TURNED, TURNED_BLOCKS, ALWAYS_R4),
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
            "values": WITHIN_HEADS,
        },
        rotations=("R1", "R2", "R4"),
        divides=SITE_NAMES,
        hadamard=HADAMARD,
        **ON_WINDOWS,
        online=(
            replace(SIGNED, when={"residual": ("online",), "basis": ("none",)}),
            replace(ROTATED, when={"residual": ("online",), "basis": ("weights",)}),
            ROTATED,
            *(replace(turned, when={"values": ("online",), "basis": ("none",)}) for turned in TURNED),
            replace(TURNED_BLOCKS, when={"values": ("online",), "basis": ("weights",)}),
            TURNED_BLOCKS,
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
            "values": WITHIN_HEADS,
        },
        rotations=("R1", "R2", "R4"),
        hadamard=HADAMARD,
        **LEARNED,
        online=(SIGNED, ROTATED, *TURNED, TURNED_BLOCKS, ALWAYS_R4),
    ),
}
