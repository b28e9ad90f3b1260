"""Reference pages from the code: keys of a config (schema), methods and formats (registry,
presets), commands (Makefile) and rules (workflow).

`python docs/reference_pages.py` writes them again, in a second."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "docs")]

from method_pages import formats, methods, table, value  # noqa: E402 (the library is in scripts/, not installed)

from quantgrid.config.races import DEFAULTS as RACE_DEFAULTS  # noqa: E402
from quantgrid.config.validation import CALIBRATION_DEFAULTS, DEFAULTS  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
RULE = re.compile(
    r'^ *(?:rule|checkpoint) (\w+):\n +"""(.+?)"""\n(.*?)(?=^ *(?:rule|checkpoint) |\Z)', re.MULTILINE | re.DOTALL
)
OUTPUT = re.compile(r'^ +(\w+)=(?:\w+\()?f"\{RESULTS\}/([^"]+)"', re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z-]*):.*?## (.+)$", re.MULTILINE)
VARIABLE = re.compile(r"^#   (\S.*?)  +(\S.*)$", re.MULTILINE)
ENTRIES = {
    "transforms": "methods.md#transforms-before-rounding",
    "mitigations": "methods.md#mitigations-while-rounding",
}
OF_ENTRIES = {"calibrations.NAME": CALIBRATION_DEFAULTS, "studies.NAME.race": RACE_DEFAULTS}
_WRITTEN = "Written by `python docs/reference_pages.py` from {}. Do not edit it by hand."
_CONFIG = """# Keys of a config

{written}

A key occurs once in each mapping. Names of entries are at most 64 letters, digits, `.`, `_` and `-`,
begin with a letter or a digit, and differ in more than upper and lower case. YAML reads `1e-5` as
text: write `1.0e-5`. `NAME` stands for a name of your choice, `[]` for an item of a list. Mistakes are
reported before anything runs, with the accepted values.
"""


def resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A node of the schema with its references followed; what the node states itself wins."""
    found: dict[str, Any] = dict(node)
    while "$ref" in found:
        target = schema["$defs"][found.pop("$ref").rsplit("/", 1)[1]]
        found = {**target, **found}
    return found


def keys(
    path: str, node: Mapping[str, Any], schema: Mapping[str, Any], needed: str = ""
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(path, node, whether it is required and where) of a key and of all keys below it."""
    node = resolved(node, schema)
    yield path, node, needed
    for name, below in node.get("properties", {}).items():
        yield from keys(f"{path}.{name}", below, schema, required(name, node))
    entries = node.get("additionalProperties")
    if isinstance(entries, Mapping) and "properties" in resolved(entries, schema):
        yield from keys(f"{path}.NAME", entries, schema)
    items = node.get("items")
    if isinstance(items, Mapping) and "properties" in resolved(items, schema):
        yield from keys(f"{path}[]", items, schema)


def required(name: str, node: Mapping[str, Any]) -> str:
    """Whether an entry needs the key ``name``: always, with some of its sources, or (empty) never."""
    if name in node.get("required", ()):
        return "*required*"
    sources = [
        source
        for rule in node.get("allOf", ())
        if name in rule["then"]["required"]
        for asked in [rule["if"]["properties"]["source"]]
        for source in asked.get("enum", [asked.get("const")])
    ]
    return f"*required* ({', '.join(sources)})" if sources else ""


def types(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Accepted values of a key, in words."""
    if "enum" in node:
        return ", ".join(f"`{value(item)}`" for item in node["enum"])
    names = node.get("type", "object")
    words = {"object": "mapping", "array": "list", "string": "text", "integer": "whole number", "null": "`null`"}
    parts = [words.get(name, name) for name in (names if isinstance(names, list) else [names])]
    bounds = [
        f"{sign} {node[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in node and abs(node[key]) < 10**9
    ]
    text = " or ".join(parts) + (f" {', '.join(bounds)}" if bounds else "")
    items = resolved(node["items"], schema) if isinstance(node.get("items"), Mapping) else {}
    return f"{text} of {types(items, schema)}" if "enum" in items else text


def default(path: str) -> str:
    """Default of a key; empty where a key is required or has none."""
    entry, name = path.rpartition(".")[::2]
    if entry in OF_ENTRIES:
        found: Any = OF_ENTRIES[entry].get(name)
    else:
        found = DEFAULTS
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    return "" if found is None or found in ({}, []) or isinstance(found, Mapping) else f"`{value(found)}`"


def config() -> str:
    """The page of all keys of a config."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    parts = [_CONFIG.format(written=_WRITTEN.format("`workflow/schemas/config.schema.yaml`")).rstrip()]
    for name, node in schema["properties"].items():
        found = list(keys(name, node, schema))
        top = found[0][1]
        needed = " Required." if name in schema["required"] else ""
        said = top.get("description", "") if len(found) > 1 else ""
        parts += [f"## {name}", (f"{said[:1].upper()}{said[1:]}." if said else "") + needed]
        if name in ENTRIES:
            parts += [f"Options of each method: [methods]({ENTRIES[name]})."]
        rows = [
            [f"`{path}`", types(below, schema), default(path) or asked, below.get("description", "")]
            for path, below, asked in (found[1:] if len(found) > 1 else found)
            if not path.endswith((".NAME", "[]"))
        ]
        parts.append(table(["key", "accepted", "default", "meaning"], rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def commands() -> str:
    """The page of the targets of make and their variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = ([f"`make {name}`", words] for name, words in TARGET.findall(text))
    variables = ([f"`{name}`", words] for name, words in VARIABLE.findall(text.partition("\nPYTHON ?=")[0]))
    written = _WRITTEN.format("the Makefile")
    return "\n\n".join(
        [
            "# Commands",
            written,
            table(["command", "purpose"], targets),
            "## Variables",
            table(["variable", "meaning"], variables),
            "",
        ]
    )


def written(body: str) -> str:
    """The outputs in the body of a rule."""
    return body.partition("    output:\n")[2].partition("    log:\n")[0]


def rules() -> str:
    """The page of the rules of the workflow, with the files that each leaves."""
    parts = [
        "# Rules",
        _WRITTEN.format("`workflow/rules/`") + " [Rule graph](rulegraph.md) draws them.",
        "Paths are below the results folder. Every rule also leaves a log (`logs/`), a benchmark (`benchmarks/`)\n"
        "and a record of its files (`digests/`).",
    ]
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        found = RULE.findall(path.read_text(encoding="utf-8"))
        rows = [
            [
                f"`{name}`",
                " ".join(words.split()),
                ", ".join(
                    f"`{place.replace('{{', '{').replace('}}', '}')}`"
                    for key, place in OUTPUT.findall(written(body))
                    if key != "digest"
                ),
            ]
            for name, words, body in found
        ]
        parts += [f"## {path.stem}.smk", table(["rule", "purpose", "files"], rows)] if rows else []
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "config": config,
    "methods": methods,
    "presets": formats,
    "commands": commands,
    "rules": rules,
}


def main() -> None:
    for name, page in PAGES.items():
        (REFERENCE / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
