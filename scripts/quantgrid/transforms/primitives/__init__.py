"""Elementary function-preserving changes, one file per kind; importing this registers them all."""

from . import (
    affine,
    balanced_blocks,
    block_rotate,
    chosen_rotate,
    learned,
    learned_clip,
    norms,
    reorder,
    rotate,
    rotate_principal,
    scale,
    searched_clip,
    searched_scale,
    shift,
)

__all__ = [
    "affine",
    "balanced_blocks",
    "block_rotate",
    "chosen_rotate",
    "learned",
    "learned_clip",
    "norms",
    "reorder",
    "rotate",
    "rotate_principal",
    "scale",
    "searched_clip",
    "searched_scale",
    "shift",
]
