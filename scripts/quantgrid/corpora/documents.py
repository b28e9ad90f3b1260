"""Documents of a file or hub data set: texts or chat messages, each with its location.

A value of another type is refused with its location and type, never converted. ``check_local``
reads the first records of a file while the workflow is planned. Standard library only; pyarrow and
datasets are imported on use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError
from .text_records import Located, beginning, field_of, format_of, kind, records, require_text

CHAT = "chat_template"
PLANNED = 100  # records of a file that are checked during planning


def read_local(entry: Mapping[str, Any], where: str) -> list[Located]:
    """(location, text or messages) of every record of a local file.

    A null that ``skip_null`` drops becomes None.
    """
    path, form = _place(entry, where)
    return list(_documents(records(path, form, entry.get("field", "text")), form, entry))


def check_local(entry: Mapping[str, Any], where: str) -> None:
    """Validate the first :data:`PLANNED` records of a local file as :func:`read_local` would."""
    path, form = _place(entry, where)
    for _ in _documents(beginning(path, form, PLANNED, entry.get("field", "text")), form, entry):
        pass


def _place(entry: Mapping[str, Any], where: str) -> tuple[Path, str]:
    path = Path(entry.get("path") or "").expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}.path: {entry.get('path') or ''}: no such file")
    form = format_of(path, entry.get("format"), f"{where}.format")
    if form == "text" and entry.get("render"):
        raise ConfigError(f"{where}.render: {path} is plain text without messages; accepted: jsonl, json or parquet")
    return path, form


def _documents(found: Iterator[Located], form: str, entry: Mapping[str, Any]) -> Iterator[Located]:
    field = entry.get("field", "text")
    for at, record in found:
        whole = form == "text"
        yield at, _value(record if whole else field_of(record, field, at), at, "the file" if whole else field, entry)


def _value(value: Any, at: str, field: str, entry: Mapping[str, Any]) -> Any:
    if value is None and entry.get("skip_null"):
        return None
    if entry.get("render") == CHAT:
        return _messages(value, at, field)
    advice = "; skip_null: true leaves such records out" if value is None else ""
    if isinstance(value, list):
        advice = f"; render: {CHAT} makes text of messages"
    return require_text(value, at, field, advice)


def _messages(value: Any, at: str, field: str) -> list[dict[str, Any]]:
    """Validate a conversation: messages with the texts ``role`` and ``content``."""
    if not isinstance(value, list) or not value:
        held = "an empty list" if value == [] else kind(value)
        raise ConfigError(f"{at}: '{field}' holds {held}, not a list of messages (render: {CHAT})")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(
                f"{at}: message {number} of '{field}' is {kind(message)} without 'role' and 'content' (render: {CHAT})"
            )
        for key in ("role", "content"):
            require_text(message[key], at, f"{field}.{number}.{key}")
    return value


def read_hub(entry: Mapping[str, Any], where: str) -> list[Located]:
    """As :func:`read_local` for a data set of the Hugging Face hub: ``documents`` records, or
    all."""
    from datasets import load_dataset

    count = entry.get("documents")
    try:
        dataset = load_dataset(
            entry["id"],
            entry.get("name"),
            split=entry.get("split", "train"),
            revision=entry.get("commit") or entry.get("revision"),
            data_files=entry.get("data_files"),
            streaming=count is not None,
        )
        rows = list(islice(dataset, count))
    except KeyError as missing:
        raise ConfigError(
            f"{where}: no {missing}; a hub corpus needs 'id', and 'field' names the text column"
        ) from None
    # the hub, the file formats and the network raise different exceptions
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{where}: dataset '{entry['id']}' cannot be read: {reason} (gated: accept its licence on "
            "its hub page and run `hf auth login`; offline: use source: local or builtin)"
        ) from None
    places = ((f"{where}: record {number} of '{entry['id']}'", row) for number, row in enumerate(rows))
    return list(_documents(places, "rows", entry))
