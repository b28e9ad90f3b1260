"""Violations of the config schema (``workflow/schemas/config.schema.yaml``), one line each with the
key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

from ..ground.documents import DEPTH, VALUES
from ..ground.errors import ConfigError, name_hint, shortened, shown, text_hint, unknown_name
from ..ground.places import ROOT

SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
LARGEST = 2**63 - 1  # the largest number that jobs can parse
_MOST = 100  # number of schema errors reported
_LONGEST_TEXT = 10_000
# NUL and lone surrogates, possible only through an escape in quotes
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_NO_MAPPING = "the config is not a mapping; it holds the keys models, corpora, calibrations, studies, ..."


def schema_mistakes(content: Any) -> Iterator[str]:
    """List the values that no config may contain, else the errors of the schema, one line each."""
    if not isinstance(content, Mapping):
        yield _NO_MAPPING
        return
    try:
        found = list(islice(_odd_values(content), _MOST))
    except ConfigError as error:
        found = [str(error)]
    if found:
        yield from found
        return
    for error in sorted(  # type: ignore[misc]
        islice(_validator().iter_errors(content), _MOST), key=lambda error: list(map(str, error.absolute_path))
    ):
        where = ".".join(shortened(str(part)) for part in error.absolute_path) or "config"
        yield from _explained(error, where)


def _odd_values(content: Mapping[str, Any]) -> Iterator[str]:
    """Find values that JSON does not have or that no job can receive: dates, sets, NaN, integers of
    more than 64 bits."""
    pending, count = [(content, "", 0)], 0
    while pending:
        value, where, depth = pending.pop()
        count += 1
        if depth > DEPTH or count > VALUES:
            raise ConfigError(f"config: more than {VALUES} values, or nested more than {DEPTH} deep")
        if isinstance(value, Mapping):
            pending += [
                (inner, f"{where}.{shortened(str(key))}".lstrip("."), depth + 1)
                for key, inner in reversed(value.items())  # type: ignore[call-overload]
            ]
        elif isinstance(value, list):
            pending += [(inner, f"{where}.{number}", depth + 1) for number, inner in reversed(list(enumerate(value)))]
        elif reason := _oddity(value):
            yield f"{where}: {shown(value)} {reason}"


def _oddity(value: Any) -> str:
    """Return the reason to reject this scalar; empty if it is accepted."""
    if isinstance(value, str):
        long = (
            f"has {len(value)} characters; a text of at most {_LONGEST_TEXT} can be passed on to jobs"
            if len(value) > _LONGEST_TEXT
            else ""
        )
        return long or ("holds a character that cannot be passed on to jobs" if _UNUSABLE.search(value) else "")
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        return "" if -LARGEST <= value <= LARGEST else f"is out of range; numbers of at most {LARGEST} are read"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is out of range; expected a finite number"
    return f"is a {type(value).__name__}; expected a text (in quotes), a number, true, false, a list or a mapping"


@cache
def _validator() -> Any:
    import yaml
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend

    def unique(_: Any, wanted: bool, value: Any, __: Any) -> Iterator[ValidationError]:
        """Check ``uniqueItems`` in a single pass; jsonschema compares all pairs of unsortable
        items."""
        if wanted and isinstance(value, list) and len({f"{type(item)}{item!r}" for item in value}) < len(value):
            yield ValidationError(f"{shown(value)} has non-unique elements")

    whole = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: type(value) is int
    )  # not 4.0: torch rejects it
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    return extend(Draft202012Validator, {"uniqueItems": unique}, type_checker=whole)(schema)


def _explained(error: Any, where: str) -> Iterator[str]:
    """Explain a schema error, one line per violation."""
    if "propertyNames" in error.absolute_schema_path:
        yield f"{where}: {shown(error.instance)} is not accepted as a name; {_name_advice(error.instance)}"
    elif error.validator == "additionalProperties":
        accepted = list(error.schema.get("properties", {}))
        for key in (key for key in error.instance if key not in accepted):
            yield f"{where}: {unknown_name('key', key, accepted)}"
    elif error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        keys, are = ("keys", "are") if len(missing) > 1 else ("key", "is")
        yield f"{where}: the {keys} {', '.join(map(repr, missing))} {are} missing"
    elif error.validator == "enum":
        hint = name_hint(str(error.instance)[:100], [str(value) for value in error.validator_value])
        accepted = ", ".join(map(str, error.validator_value))  # type: ignore[assignment]
        yield f"{where}: {shown(error.instance)} is not accepted{hint} Accepted: {accepted}"
    elif error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        expected = f"{' or '.join(wanted)}{text_hint(error.instance)}"
        yield f"{where}: {shown(error.instance)} is of the wrong type; expected {expected}"
    elif error.validator == "pattern":
        yield f"{where}: {shown(error.instance)} is not accepted; expected {error.schema['description']}"
    else:
        yield f"{where}: {shortened(error.message)}"


def _name_advice(name: Any) -> str:
    """Explain the accepted names of an entry, and the fault in this one."""
    if isinstance(name, str) and name.startswith("-"):
        return "a leading '-' is read as an option by command-line tools; begin with a letter or a digit"
    if isinstance(name, str) and name.startswith("."):
        return "a leading '.' hides files, and '..' is another folder; begin with a letter or a digit"
    if isinstance(name, str) and len(name) > 64:
        return f"{len(name)} characters; names of files are made of it, so at most 64"
    return "expected a text of letters, digits, '.', '_' and '-' (a number in quotes)"
