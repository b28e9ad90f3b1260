"""Mistakes that the schema of configs shows (``workflow/schemas/config.schema.yaml``), one line each, with the key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from .documents import DEPTH, VALUES
from .errors import ConfigError, shortened, shown, text_hint, unknown_name

SCHEMA = Path(__file__).resolve().parents[2] / "workflow" / "schemas" / "config.schema.yaml"
LARGEST = 2**63 - 1  # beyond it numbers do not fit what jobs read them with
_MOST = 100  # schema errors that are looked at
_LONGEST_TEXT = 10_000
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which only an escape in quotes can write
_NO_MAPPING = "the config is not a mapping; it holds the keys models, corpora, calibrations, studies, ..."


def schema_mistakes(content: Any) -> Iterator[str]:
    """A line for each value that no config may hold, else for each error of the schema."""
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
    for error in sorted(
        islice(_validator().iter_errors(content), _MOST), key=lambda error: list(map(str, error.absolute_path))
    ):
        where = ".".join(shortened(str(part)) for part in error.absolute_path) or "config"
        yield from _explained(error, where)


def _odd_values(content: Mapping[str, Any]) -> Iterator[str]:
    """Values that JSON does not have, or that no job can be given: dates, sets, NaN, numbers of more than 64 bits."""
    pending, count = [(content, "", 0)], 0
    while pending:
        value, where, depth = pending.pop()
        count += 1
        if depth > DEPTH or count > VALUES:
            raise ConfigError(f"config: more than {VALUES} values, or nested more than {DEPTH} deep")
        if isinstance(value, Mapping):
            pending += [
                (inner, f"{where}.{shortened(str(key))}".lstrip("."), depth + 1)
                for key, inner in reversed(value.items())
            ]
        elif isinstance(value, list):
            pending += [(inner, f"{where}.{number}", depth + 1) for number, inner in reversed(list(enumerate(value)))]
        elif reason := _oddity(value):
            yield f"{where}: {shown(value)} {reason}"


def _oddity(value: Any) -> str:
    """Reason why no config may hold this scalar, empty where it may."""
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
        """``uniqueItems`` in the time of one pass: jsonschema compares every pair of items that cannot be sorted."""
        if wanted and isinstance(value, list) and len({f"{type(item)}{item!r}" for item in value}) < len(value):
            yield ValidationError(f"{shown(value)} has non-unique elements")

    whole = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: type(value) is int
    )  # 4.0 is none: torch refuses it too
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    return extend(Draft202012Validator, {"uniqueItems": unique}, type_checker=whole)(schema)


def _explained(error: Any, where: str) -> Iterator[str]:
    """One line for each thing that a schema error says."""
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
        close = get_close_matches(str(error.instance)[:100], [str(value) for value in error.validator_value], n=1)
        hint = f" - did you mean '{close[0]}'?" if close else "."
        accepted = ", ".join(map(str, error.validator_value))
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
    """What a name of an entry may be, and why this one is none."""
    if isinstance(name, str) and name.startswith("-"):
        return "a leading '-' is read as an option by command-line tools; begin with a letter or a digit"
    if isinstance(name, str) and name.startswith("."):
        return "a leading '.' hides files, and '..' is another folder; begin with a letter or a digit"
    if isinstance(name, str) and len(name) > 64:
        return f"{len(name)} characters; names of files are made of it, so at most 64"
    return "expected a text of letters, digits, '.', '_' and '-' (a number in quotes)"
