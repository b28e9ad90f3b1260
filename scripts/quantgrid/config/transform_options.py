"""Options and run-time operations that several transforms have."""

from __future__ import annotations

from .methods import STREAM, VALUES, Online
from .options import Option

SITE_NAMES = ("attention_input", "output_input", "mlp_input", "down_input")
ALL_SITES = Option(list(SITE_NAMES), choices=SITE_NAMES)
SCALING_SITES = Option(["attention_input", "mlp_input"], choices=SITE_NAMES)
BLOCK_SIZE = Option(32, choices=(16, 32, 64, 128))
STATISTIC = ("maximum", "mean", "rms")
CENTER = Option("median", choices=("median", "mean", "midrange"))
# the mean of down_input costs accuracy (docs/reference/transforms.md)
SHIFTED_SITES = Option(list(SITE_NAMES[:3]), choices=SITE_NAMES)
ROTATIONS = {
    "rotations": Option(["R1", "R2", "R4"], choices=("R1", "R2", "R4")),
    "basis": Option("none", choices=("none", "activations", "weights")),
}
# rotations that are applied only where they lower the error
CHOOSE = Option(
    [], choices=("R2", "R4"), needs=tuple((rotation, "rotations", (rotation,)) for rotation in ("R2", "R4"))
)
# where the exact place of an operation is not in the weights: docs/reference/models.md
RESIDUAL = Option("offline", choices=("offline", "online"))
DIVISION = Option("offline", choices=("offline", "online"))
WITHIN_HEADS = Option("offline", choices=("offline", "online"))
HADAMARD = ("hidden_size", "head_dim", "intermediate_size")
ONLINE_R4 = Online("down_input", "hadamard", {"rotations": ("R4",)}, chosen=("choose", "R4"))
ALWAYS_R4 = Online("down_input", "hadamard")
SIGNED = Online(STREAM, "signed_hadamard", {"residual": ("online",)})
TURNED = tuple(Online(VALUES, name, {"values": ("online",)}) for name in ("multiply", "block_hadamard"))
TURNED_BLOCKS = Online(VALUES, "block_rotate", {"values": ("online",)})
ROTATED = Online(STREAM, "block_rotate", {"residual": ("online",)})
