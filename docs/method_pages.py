"""Reference pages of methods and number formats, from the registry, the presets and the docstrings
of the modules of the methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantgrid.config.methods import Method
from quantgrid.config.options import Option
from quantgrid.config.registry import METHODS, PUBLISHED
from quantgrid.schemes.number_formats import ELEMENT_FORMATS, SCALE_FORMATS, NumberFormat
from quantgrid.schemes.presets import PRESETS

LIBRARY = Path(__file__).resolve().parents[1] / "scripts" / "quantgrid"
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")
COLUMNS = re.compile(r"\S {3,}\S")  # a line with columns inside
STEPS = {"transforms": "before rounding", "mitigations": "while rounding"}
SCHEME = {"element": "element", "scale_format": "scales", "granularity": "granularity", "symmetric": "symmetric"}

_METHODS = """# Methods and their options

Written by `python docs/reference_pages.py` from the registry (`scripts/quantgrid/config/registry.py`) and
the docstrings of the methods. Do not edit it by hand.

Every method can be named in a study without an entry. An entry under `transforms` or `mitigations`
names a `method` and the options that differ from the defaults. Methods that read calibration
statistics also take `calibration`; those that draw at random take `seed` or `seeds`.
"""
_FORMATS = """# Presets and number formats

Written by `python docs/reference_pages.py` from `scripts/quantgrid/schemes/`. Do not edit it by hand.
[Number formats](formats.md) explains the fields of a scheme and how toolkits differ.

With scale s, zero point z, global scale g (1 without one) and Q the rounding to the nearest value of
the element format, ties to even, a value x of a scale block becomes

```text
symmetric   x̂ = g s Q(x / (g s))                         g s = max |x| / qmax
asymmetric  x̂ = g s (clamp(round(x / (g s)) + z) - z)    g s = (max x - min x) / (2^bits - 1), z = round(-min x / (g s))
unsigned    x̂ = g s Q((x - m) / (g s)) + m               m = min x, kept in float32
```

Q and clamp stay within the codes of the element format, max and min are those of the block's range
(`range`), and s is rounded to the scale format, a power of two by its `scale_rule`.
"""


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, [":--"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def docstring(module: str) -> str:
    """The docstring of a module of the library as Markdown, arXiv numbers as links."""
    source = (LIBRARY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    paragraphs = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    return "\n\n".join(_paragraph(text) for text in paragraphs)


def _paragraph(text: str) -> str:
    if any(COLUMNS.search(line) for line in text.splitlines()):
        return f"```text\n{text}\n```"
    text = re.sub(r"(?<=[\w.)]) Deviations?: ", "\n\n**Deviations:** ", " ".join(text.split()))
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text.replace("``", "`"))


def value(found: object) -> str:
    """A default as YAML writes it."""
    if isinstance(found, list):
        return f"[{', '.join(map(str, found))}]"
    return str(found).lower() if isinstance(found, bool) else str(found)


def default(option: Option) -> str:
    """Default of an option, as a quotient where another option divides it."""
    return f"{option.default:g} / {option.divided_by}" if option.divided_by else value(option.default)


def accepted(option: Option) -> str:
    """Accepted values of an option, and the other options that it or one of its values needs."""
    needs = [
        f"{'' if given is None else f'`{value(given)}` '}with `{other}`: {' or '.join(map(value, values))}"
        for given, other, values in option.needs
        if given is None or given in (option.choices or (given,))
    ]
    needs += [
        f"`{given}` with {' or '.join(f'`{name}`' for name in some)} > 0" for given, some in option.needs_some.items()
    ]
    needs += [f"at most `{option.at_most}`"] if option.at_most else []
    return "; ".join([option.describe(), *dict.fromkeys(needs)])


def traits(method: Method) -> list[str]:
    """Inputs and costs of a method, in words."""
    found = {
        "reads calibration statistics": method.calibrated,
        "fitted to the scheme of its cell": method.fitted_to_scheme,
        "random (`seed`, `seeds`)": method.seeded,
        "trained": method.learned or bool(method.training),
        "needs a Hadamard matrix of the size of an input": bool(method.hadamard or method.hadamard_of),
        "compares two models (`propagation: sequential` only)": method.paired,
        "honours a global scale of several linears (`global_scale: site`)": method.shares_scales,
        "leaves operations to the run time": bool(method.online),
    }
    return [
        f"{words} with {', '.join(f'`{option}: {value(v)}`' for option, values in condition.items() for v in values)}"
        if isinstance(condition, Mapping)
        else words
        for words, condition in found.items()
        if condition
    ]


def section(name: str, method: Method) -> str:
    """Summary, source, deviations, traits and options of a method."""
    parts = [f"### {name}", docstring(method.module)]
    parts += [f"*{'; '.join(found)}.*"] if (found := traits(method)) else []
    rows = [[f"`{key}`", f"`{default(option)}`", accepted(option)] for key, option in method.options.items()]
    return "\n\n".join([*parts, *([table(["option", "default", "accepted"], rows)] if rows else [])])


def methods() -> str:
    """The page of all transforms and mitigations."""
    parts = [_METHODS.rstrip()]
    for axis, found in METHODS.items():
        rows = [[f"[`{name}`](#{name})", method.summary] for name, method in found.items() if name != "none"]
        parts += [f"## {axis.capitalize()}: {STEPS[axis]}", table(["method", "in a sentence"], rows)]
        named = [
            [f"`{name}`", ", ".join(f"`{key}: {value(v)}`" for key, v in entry.items())]
            for name, entry in PUBLISHED[axis].items()
        ]
        parts += ["Known without an entry as well:", table(["name", "entry"], named)] if named else []
        parts += [section(name, method) for name, method in found.items() if name != "none"]
    return "\n\n".join(parts) + "\n"


def scheme(fields: Mapping[str, object] | None) -> str:
    """Fields of a preset's side in words."""
    if fields is None:
        return "full precision"
    described = [f"`{fields['element']}`", "symmetric" if fields.get("symmetric", True) else "asymmetric"]
    return ", ".join(
        [
            *described,
            *(
                f"`{name}: {value(v)}`"
                for name, v in fields.items()
                if name not in ("element", "symmetric", "granularity")
            ),
        ]
    )


def numbers(found: Mapping[str, NumberFormat]) -> str:
    """A table of number formats: bits and range."""
    return table(
        ["name", "kind", "bits", "largest", "smallest positive"],
        (
            [
                f"`{name}`",
                f.kind,
                str(f.bits),
                f"{f.maximum:.6g}",
                "-" if f.kind == "kmeans" else f"{f.minimum_positive:.4g}",
            ]
            for name, f in found.items()
        ),
    )


def formats() -> str:
    """The page of presets, element formats and scale formats."""
    presets = (
        [
            f"`{name}`",
            scheme(preset["weight"]),
            scheme(preset["activation"]),
            f"{preset['block']}" if preset["block"] else "of the study",
        ]
        for name, preset in PRESETS.items()
    )
    return "\n\n".join(
        [
            _FORMATS.rstrip(),
            "## Presets",
            "Scales are float32 and granularities those of the study unless a field says otherwise.",
            table(["preset", "weights", "activations", "group size"], presets),
            "## Element formats",
            numbers(ELEMENT_FORMATS),
            "## Scale formats",
            numbers(SCALE_FORMATS),
            "",
        ]
    )
