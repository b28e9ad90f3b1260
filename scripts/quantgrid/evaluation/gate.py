"""What has to hold of a model before anything of it is quantized: nothing calibrated on is evaluated on, and full precision is as published.

The published perplexity stands in the config (``models.<name>.published: {corpus: value}``). A measured one that is off by more than
``TOLERANCE`` nearly always means another checkpoint or another protocol, and every table that followed would be about something else.
Standard library only; texts are compared by ``corpora.check_disjoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..provenance import canonical
from .protocols import described

TOLERANCE = 0.01  # relative
CAUSES = ("the checkpoint is the Instruct model and the published value that of the base model (or the reverse), or another revision",
          "another window: 2048, 4096 and 8192 tokens give different perplexities of the same model; or only some windows of the corpus",
          "BOS: a window with it (add_bos: true) and one without differ, on some models widely",
          "another split or text of the corpus, or another string between its documents (join)",
          "a perplexity per word instead of per token")


def check_published(model: str, corpus: str, published: float, found: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the JSON of ``evaluate_perplexity`` of the full-precision cell with the ``published`` perplexity.

    Returns {published, measured, gap (relative)}; :class:`ConfigError` with likely causes and the protocol beyond ``TOLERANCE``, or where the
    evaluation failed.
    """
    key = f"models.{model}.published.{corpus}"
    if found["status"] != "ok":
        raise ConfigError(f"{key}: the full-precision model cannot be compared with {published}, its evaluation failed: {found['reason']}")
    measured = found["perplexity"]
    gap = measured / published - 1
    if not abs(gap) <= TOLERANCE:
        causes = "".join(f"\n  - {cause}" for cause in CAUSES)
        raise ConfigError(f"{key}: full precision measures {measured:.4f}, published is {published} ({gap:+.1%}, accepted is ±{TOLERANCE:.0%}); "
                          f"nothing of '{model}' is quantized. Likely causes:{causes}\nMeasured under: {described(canonical(found['protocol']))}. "
                          "Correct the model or its corpus, or remove the published value if it is of another protocol")
    return {"published": published, "measured": measured, "gap": gap}
