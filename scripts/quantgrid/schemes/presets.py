"""Format presets as data: name -> fields of the weight and activation schemes. Standard library
only.

The code hash of a path never covers this file: the content of a preset reaches a job through its
specification, so a new line reruns nothing.
"""

from __future__ import annotations


def _preset(weight: dict | None, activation: dict | None, block: int | None = None) -> dict:
    grouping = {"granularity": "group", "group_size": block} if block else {}
    return {"weight": None if weight is None else weight | grouping,
            "activation": None if activation is None else activation | grouping, "block": block}  # fmt: skip


def _integer(bits: int, symmetric: bool = True) -> dict:
    return {"element": f"int{bits}", "symmetric": symmetric}


def _microscaling(element: str, rule: str = "floor") -> dict:
    return _preset(*[{"element": element, "scale_format": "e8m0", "scale_rule": rule}] * 2, block=32)  # type: ignore[misc, arg-type]


def _two_level(element: str, weights: str = "tensor", activations: str = "token") -> dict:
    scheme = {"element": element, "scale_format": "e4m3"}
    return _preset(scheme | {"global_scale": weights}, scheme | {"global_scale": activations}, block=16)


def _served_weight(bits: int) -> dict:
    """Symmetric integers with scales in the dtype of the model, as servers keep them."""
    return _integer(bits) | {"scale_format": "bf16"}


def _served(bits: int) -> dict:
    """Integers that compressed-tensors computes: the largest activation at half a step beyond the
    largest code."""
    return _preset(_served_weight(bits), _integer(bits) | {"qmax": 2 ** (bits - 1) - 0.5})


def _four_six() -> dict:
    """NVFP4 with the best scale of each weight block, and four-six activations."""
    found = _two_level("e2m1")
    return found | {
        "weight": found["weight"] | {"range": "exhaustive"},
        "activation": found["activation"] | {"range": "four_six"},
    }


# Preset -> fields of its weight and activation schemes (None: full precision) and the block that
# the format defines.
PRESETS: dict[str, dict] = {
    "bf16": _preset(None, None),
    **{f"int{bits}": _preset(_integer(bits), _integer(bits, symmetric=False)) for bits in range(2, 9)},
    "int4_sym": _preset(_integer(4), _integer(4)),
    "int4_asym": _preset(_integer(4, symmetric=False), _integer(4, symmetric=False)),
    "w4a16": _preset(_integer(4), None),
    "w8a16": _preset(_integer(8), None),
    "w16a4": _preset(None, _integer(4, symmetric=False)),
    "w16a8": _preset(None, _integer(8, symmetric=False)),
    "w4a8": _preset(_integer(4), _integer(8)),
    "w8a8": _preset(_integer(8), _integer(8)),
    "fp4": _preset({"element": "e2m1"}, {"element": "e2m1"}),
    "fp8": _preset({"element": "e4m3"}, {"element": "e4m3"}),
    "nf4": _preset({"element": "nf4"}, None),
    **{f"kmeans{bits}": _preset({"element": f"kmeans{bits}"}, None) for bits in (2, 3, 4)},
    **{
        f"fp4_{element}": _preset({"element": "e2m1"}, {"element": element, "symmetric": False})
        for element in ("ue2m2", "ue3m1")
    },
    "mxfp4": _microscaling("e2m1"),
    "mxfp6": _microscaling("e2m3"),
    "mxfp8": _microscaling("e4m3"),
    "mxint4": _microscaling("int4"),
    "nvfp4": _two_level("e2m1"),
    "nvint4": _two_level("int4"),
    "nvfp4_46": _four_six(),
    # numbers that servers compute too, up to the dtype of their arithmetic (docs/how-to/deploy.md)
    **{f"w4a16_g{group}": _preset(_served_weight(4), None, block=group) for group in (64, 128)},
    "w8a8_served": _served(8),
    "w4a4_served": _served(4),
    "mxfp4_served": _microscaling("e2m1", "even"),
    "mxfp6_served": _microscaling("e2m3", "even"),
    "mxfp8_served": _microscaling("e4m3", "rceil"),
    "nvfp4_served": _two_level("e2m1", weights="site", activations="static"),
}
