"""Documents of local tasks: layouts, whitespace conventions, errors with file and line.

Whitespace is part of a task. ``whitespace: exact`` (the default) keeps every text of the file and
puts ``delimiter`` between query and answer: empty for a single continuation of a context, one space
for a choice. ``whitespace: lm-eval`` is the convention of lm-eval's own tasks: answers are stripped
and follow one space; it does not accept a ``delimiter``. Standard library only: local tasks are
read whole while the workflow is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..corpora.text_records import format_of, kind, records, require_text
from ..ground.errors import ConfigError, unknown_name

WHITESPACE = ("exact", "lm-eval")


@dataclass(frozen=True)
class Layout:
    """Keys of a document, settings of lm-eval's ConfigurableTask, and the default delimiter."""

    keys: frozenset[str]
    settings: Mapping[str, Any]
    delimiter: str = ""


LAYOUTS = {
    "choices": Layout(
        frozenset({"query", "choices", "gold"}),
        {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"},
        " ",
    ),
    "greedy": Layout(
        frozenset({"context", "continuation"}),
        {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"},
    ),
    "contexts": Layout(
        frozenset({"context_options", "continuation", "gold"}),
        # lm-eval marks several contexts by an integer doc_to_text
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
        " ",
    ),
}
METRICS = {"choices": ("acc", "acc_norm"), "greedy": ("acc",), "contexts": ("acc", "acc_norm")}


def layout_of(document: Mapping[str, Any]) -> str:
    """Layout name of a validated document."""
    return next(name for name, layout in LAYOUTS.items() if layout.keys == document.keys())


def delimiter_of(entry: Mapping[str, Any], layout: str) -> tuple[str, str]:
    """(end of the query, beginning of the answer): the delimiter of a task, split.

    Trailing whitespace of the delimiter goes to the answer. The text is the same either way;
    lm-eval counts the characters of an answer without this prefix.
    """
    if entry.get("whitespace") == "lm-eval":
        return "", " "
    delimiter = entry.get("delimiter", LAYOUTS[layout].delimiter)
    behind = delimiter.rstrip()
    return behind, delimiter[len(behind) :]


def read_documents(entry: Mapping[str, Any], where: str = "task") -> list[dict[str, Any]]:
    """Documents of a local task for lm-eval; :class:`ConfigError` names the invalid line and field.

    Accepted are JSON lines, JSON arrays and parquet (:mod:`..text_records`). For choices the
    documents do not contain the prefix of :func:`delimiter_of`: lm-eval adds it.
    """
    path = Path(entry.get("path") or "").expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}.path: {entry.get('path') or ''}: no such file")
    form = format_of(path, None, f"{where}.path")
    if form in ("text", "csv"):
        raise ConfigError(
            f"{where}.path: {path}: accepted are JSON lines (.jsonl, .jsonl.gz), a JSON array (.json) and parquet"
        )
    checked: list[dict[str, Any]] = []
    for at, record in records(path, form):
        layout = _layout_of_line(record, at)
        if checked and layout != layout_of(checked[0]):
            raise ConfigError(f"{at}: keys {_named(layout)}, but the first line has {_named(layout_of(checked[0]))}")
        checked.append(_checked(record, layout, at, entry))
    if not checked:
        raise ConfigError(f"{where}.path: {path} holds no documents")
    _check_entry(entry, layout_of(checked[0]), where)
    return [_spaced(document, layout_of(checked[0]), entry) for document in checked]


def _named(layout: str) -> str:
    return ", ".join(sorted(LAYOUTS[layout].keys))


def _layout_of_line(record: Any, at: str) -> str:
    fitting = [name for name, layout in LAYOUTS.items() if isinstance(record, dict) and layout.keys <= record.keys()]
    if len(fitting) != 1:
        known = "; ".join(f"{{{_named(name)}}}" for name in LAYOUTS)
        has = f"has the fields {', '.join(map(str, record))}" if isinstance(record, dict) else f"is {kind(record)}"
        raise ConfigError(f"{at}: {'several' if fitting else 'none'} of the layouts {known}; the line {has}")
    return fitting[0]


def _check_entry(entry: Mapping[str, Any], layout: str, where: str) -> None:
    """Refuse settings that have no effect on a local task."""
    if (metric := entry.get("metric", "acc")) not in METRICS[layout]:
        raise ConfigError(f"{where}.metric: {unknown_name('metric', metric, METRICS[layout])}")
    if entry.get("whitespace", "exact") not in WHITESPACE:
        raise ConfigError(f"{where}.whitespace: {unknown_name('convention', entry['whitespace'], WHITESPACE)}")
    if entry.get("whitespace") == "lm-eval" and "delimiter" in entry:
        raise ConfigError(
            f"{where}.delimiter: {entry['delimiter']!r:.60}; whitespace: lm-eval always puts one space "
            "before an answer; remove delimiter and put such a text at the end of each query, or remove "
            "whitespace"
        )
    for key in ("shots", "filter"):
        if entry.get(key):
            raise ConfigError(
                f"{where}.{key}: {entry[key]!r}; examples and filters are accepted for source: lm_eval only"
            )


def _checked(record: Mapping[str, Any], layout: str, at: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Validated fields of one line."""
    document = {key: record[key] for key in sorted(LAYOUTS[layout].keys)}
    for key in ("query", "context", "continuation"):
        if key in document:
            require_text(document[key], at, key)
    if layout != "greedy":
        _check_options(document, "choices" if layout == "choices" else "context_options", at, entry)
    if "continuation" in document and not document["continuation"].strip():
        raise ConfigError(f"{at}: 'continuation' is empty; a text to score is needed")
    for context in document.get("context_options") or [document.get("query", document.get("context"))]:
        if context and not context.strip():
            raise ConfigError(f'{at}: a query or context has only whitespace; leave it empty ("") to score without one')
    return document


def _check_options(document: Mapping[str, Any], key: str, at: str, entry: Mapping[str, Any]) -> None:
    options, gold = document[key], document["gold"]
    if not isinstance(options, list):
        raise ConfigError(f"{at}: '{key}' holds {kind(options)}, not a list of texts")
    for number, option in enumerate(options):
        require_text(option, at, f"{key}.{number}")
    if not options or not all(option.strip() for option in options):
        raise ConfigError(f"{at}: '{key}' is empty or has an empty text; non-empty texts are accepted")
    if len(options) < 2:
        raise ConfigError(f"{at}: '{key}' holds one text, so every answer is correct; two or more are needed")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ConfigError(
            f"{at}: 'gold' ({gold!r:.40}) is not an index from 0 into '{key}', which holds {len(options)} texts"
        )
    compared = [option.strip() for option in options] if entry.get("whitespace") == "lm-eval" else options
    if len(set(compared)) < len(compared) and not entry.get("duplicate_choices"):
        twice = next(option for option in compared if compared.count(option) > 1)
        raise ConfigError(
            f"{at}: '{key}' holds {twice!r:.60} twice; duplicate_choices: true accepts it and scores as "
            "lm-eval does: the first of two equal choices wins"
        )


def _spaced(document: dict[str, Any], layout: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Document with the delimiter inserted, stripped under lm-eval's convention."""
    behind, before = delimiter_of(entry, layout)
    strip = entry.get("whitespace") == "lm-eval"
    if layout == "choices":
        choices = [choice.strip() for choice in document["choices"]] if strip else document["choices"]
        return {**document, "query": document["query"] + behind, "choices": choices}
    continuation = before + (document["continuation"].strip() if strip else document["continuation"])
    if layout == "contexts":
        options = [option + behind for option in document["context_options"]]
        return {**document, "context_options": options, "continuation": continuation}
    context = document["context"].rstrip() if strip else document["context"]
    return {**document, "context": context + behind, "continuation": continuation}
