"""Table of docs/reference/families.md: every transform on a tiny model of every family, measured by the gates.

`python tests/family_table.py` writes it again, in minutes on one core."""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from family_cases import FamilyModel, Verdict, verdict  # noqa: E402
from quantgrid.config.registry import TRANSFORMS  # noqa: E402
from quantgrid.models.families import FAMILIES  # noqa: E402
from quantgrid.models.family import Family  # noqa: E402

DOCUMENT = ROOT / "docs" / "reference" / "families.md"
Verdicts = dict[str, Verdict]  # transform -> outcome
_FIGURE = re.compile(r"\b(0|[1-9]e-\d+)\b")
_ABOUT = """# Families and transforms

Written by `python tests/family_table.py` from measurements on a tiny model of each family, filled with
random numbers in which every part counts (`tests/family_models.py`). Do not edit it by hand.

*Exact*: the transformed model computes the logits of the model before anything is rounded.
*Exact online*: only if what cannot be folded into the weights runs online; otherwise it is refused, and
the error message names the option. Learned transforms have random parameters here, as training could
leave them.

The figure is the largest error of a logit in units of the standard deviation of the logits, rounded
up to one digit: of the group's worst family in the first table, of its worst transform in the second.
A transform is refused from 1e-4 on. The model gate compares the model as quantgrid runs it with the
model as transformers runs it.
"""


def measure(model: FamilyModel) -> Verdicts:
    """Outcome of every transform on a family."""
    return {transform: verdict(model, transform) for transform in TRANSFORMS}


def rounded_up(value: float) -> str:
    """One digit and exponent, such as ``4e-6``; ``0`` for zero."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digit = math.ceil(value / 10**exponent)
    return f"1e{exponent + 1}" if digit == 10 else f"{digit}e{exponent}"


def figure(verdicts: Iterable[Verdict]) -> str:
    """Largest error of the outcomes."""
    return rounded_up(max(outcome.gate.logits for outcome in verdicts))


def render(models: dict[str, FamilyModel], outcomes: dict[str, Verdicts]) -> str:
    """The document: transforms x groups of families with the same outcomes, then the families."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in outcomes.items():
        groups.setdefault(tuple(outcome.kind for outcome in found.values()), []).append(name)
    letters = {name: chr(ord("A") + number) for number, names in enumerate(groups.values()) for name in names}
    first = _table(
        ["transform", *(f"group {letters[names[0]]}" for names in groups.values())],
        (
            [f"`{transform}`", *(_cell([outcomes[n][transform] for n in g]) for g in groups.values())]
            for transform in TRANSFORMS
        ),
    )
    second = _table(
        ["family", "group", "norms before and behind the linears", "differs from Llama by", "model gate", "transforms"],
        (
            [
                f"`{name}`",
                letters[name],
                _norms(FAMILIES[name]),
                _differences(FAMILIES[name]),
                rounded_up(models[name].model_gate.logits),
                figure(found.values()),
            ]
            for name, found in outcomes.items()
        ),
    )
    return f"{_ABOUT}\n## Transforms\n\n{first}\n## Families\n\n{second}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(outcomes: list[Verdict]) -> str:
    return f"{outcomes[0].kind}, {figure(outcomes)}"


def _norms(family: Family) -> str:
    before, behind = family.plan.norms, family.plan.post_norms
    return "both" if before and behind else "behind" if behind else "before"


def _differences(family: Family) -> str:
    found = {
        "experts": family.experts is not None,
        "latent attention": bool(family.latents),
        "attention sinks": family.sinks,
        "linear attention": bool(family.linear),
        "a gate behind the attention": family.output_gate,
        "LayerNorm": family.centered,
        "one norm for attention and MLP": family.parallel,
        "no gate": not family.gated,
        "linears stored transposed": family.transposed,
        "linears stored by head": family.by_head,
        "table of positions": family.positions is not None,
        "bias of the lm_head": family.head_bias,
        "norms of queries and keys": bool(family.head_norms),
        "gains stored as 1 + w": bool(family.gain_offset),
        "joined linears": bool(family.joined),
        "logits scaled or capped": bool(family.logits),
    }
    return ", ".join(name for name, holds in found.items() if holds) or "-"


def without_figures(text: str) -> str:
    return _FIGURE.sub("", text)


def document(model: Callable[[str], FamilyModel]) -> str:
    """The document, from the tiny models that ``model`` gives."""
    models = {name: model(name) for name in FAMILIES}
    return render(models, {name: measure(made) for name, made in models.items()})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = document(lambda name: FamilyModel.make(name, Path(folder) / name))
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
