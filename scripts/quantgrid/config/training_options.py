"""Options that every training has, of transforms and of mitigations."""

from __future__ import annotations

from .options import Option

ERROR = Option("squared", choices=("squared", "relative"))
# Of what is trained on windows: how many of them, the last, are kept for the comparison of start
# and end; the gradient of rounding.
WINDOWS = {"held_out": Option(16, minimum=16), "gradient": Option("range", choices=("range", "identity"))}


def training(steps: int, batch_size: int, **rates: float) -> dict[str, Option]:
    """Options of every learned transform; ``steps`` of all parameters together or, where layers are
    trained one by one, of each layer."""
    return {
        "steps": Option(steps, minimum=0),
        "batch_size": Option(batch_size, minimum=1),
        "schedule": Option("cosine", choices=("cosine", "linear")),
        **{name: Option(rate, minimum=0.0) for name, rate in rates.items()},
    }
