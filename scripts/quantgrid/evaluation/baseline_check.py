"""Baseline check: full precision has to reproduce the published perplexity before quantization.

The config holds the published perplexity (``models.<name>.published: {corpus:
value}``). A difference above ``TOLERANCE`` nearly always means another checkpoint or another
protocol, which would invalidate every later table. Standard library only;
``token_windows.check_disjoint`` compares calibration texts with evaluation texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ground.errors import ConfigError
from ..ground.provenance import canonical
from .protocols import described

TOLERANCE = 0.01  # relative
CAUSES = (
    "the checkpoint is the Instruct model and the published value that of the base model (or the reverse), "
    "or another revision",
    "another window: perplexities of 2048, 4096 and 8192 tokens differ; or only some windows of the corpus",
    "BOS: on some models windows with BOS (add_bos: true) and without differ widely",
    "another split or text of the corpus, or another string between its documents (join)",
    "a perplexity per word instead of per token",
)


def check_published(model: str, corpus: str, published: float, found: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the full-precision result of ``evaluate_perplexity`` with the ``published``
    perplexity.

    Returns {published, measured, gap (relative)}. Raises :class:`ConfigError` with likely causes
    and the protocol for a gap beyond ``TOLERANCE``, or if the evaluation failed.
    """
    key = f"models.{model}.published.{corpus}"
    if found["status"] != "ok":
        raise ConfigError(
            f"{key}: no comparison with {published}, because the full-precision evaluation failed: {found['reason']}"
        )
    measured = found["perplexity"]
    gap = measured / published - 1
    if not abs(gap) <= TOLERANCE:
        causes = "".join(f"\n  - {cause}" for cause in CAUSES)
        raise ConfigError(
            f"{key}: full precision measures {measured:.4f}, published is {published} ({gap:+.1%}, accepted is "
            f"±{TOLERANCE:.0%}); '{model}' is not quantized. Likely causes:{causes}\n"
            f"Measured under: {described(canonical(found['protocol']))}. "
            "Correct the model or its corpus, or remove the published value if it is of another protocol"
        )
    return {"published": published, "measured": measured, "gap": gap}
