"""Records of user files in several formats, each with its location for messages.

``text``   the whole file is one record, decoded from UTF-8; a byte order mark is dropped.
``jsonl``  one JSON object per line; ``json``: an array of them, or lines.
``csv``    a header line, commas, double quotes (RFC 4180); ``parquet``.

All formats except parquet may be compressed with gzip (``.jsonl.gz``). Files are read record by
record, so that the first ones of a large file take no time. Standard library only; pyarrow is
imported for parquet.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from ..ground.errors import ConfigError, unknown_name

FORMATS = ("csv", "json", "jsonl", "parquet", "text")
LONGEST_RECORD = 1 << 26  # characters; a longer line is refused
_SUFFIXES = {
    ".txt": "text",
    ".raw": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",  # first: the other marks begin with the same bytes
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_CHUNK = 1 << 16
Located = tuple[str, Any]  # location of a record, and the record


def format_of(path: Path, given: str | None, where: str) -> str:
    """Format ``given``, else that of the suffix; :class:`ConfigError` naming ``where`` if
    unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = (suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]) or [""]
    found = given or _SUFFIXES.get(suffix[0])
    if found not in FORMATS or (found == "parquet" and suffixes[-1:] == [".gz"]):
        raise ConfigError(f"{where}: {unknown_name('format', given or ''.join(suffixes[-2:]) or path.name, FORMATS)}")
    return found


def records(path: Path, form: str, field: str | None = None) -> Iterator[Located]:
    """(location, content) of every record of a file of format ``form``.

    The content is a text, a JSON value, or a dict of cells. For parquet only the column ``field``
    is read, if given. Raises :class:`ConfigError` with file and line for incomplete files, format
    errors and invalid UTF-8.
    """
    if form == "parquet":
        yield from _parquet_rows(path, field)
        return
    with _opened(path) as file:
        yield from {"text": _whole, "jsonl": _json_lines, "json": _json_records, "csv": _csv_rows}[form](file, path)


def beginning(path: Path, form: str, count: int, field: str | None = None) -> Iterator[Located]:
    """First ``count`` records; for ``text``, which is one record, the first characters."""
    if form != "text":
        yield from islice(records(path, form, field), count)
        return
    with _opened(path) as file:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        yield str(path), decoder.decode(file.read(1 << 20))


def require_text(value: Any, at: str, name: str, advice: str = "") -> str:
    """Return ``value`` if it is a valid text; else :class:`ConfigError` with location, field and
    type."""
    if not isinstance(value, str):
        raise ConfigError(f"{at}: '{name}' holds {kind(value)}, not a text{advice}")
    if "\0" in value:
        raise ConfigError(f"{at}: '{name}' holds a NUL character, so it is not text; save a UTF-16 file as UTF-8")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{at}: '{name}' holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        ) from None
    return value


def kind(value: Any) -> str:
    """JSON type of a value, for messages."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file and decompress it; gzip and decoding errors become a :class:`ConfigError`."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            start = file.peek(4)[:4]
            other = next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), None)
            if other:
                raise ConfigError(f"{path}: {other} text, by its byte order mark; save it as UTF-8")
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{path}: not a complete gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _whole(file: BinaryIO, path: Path) -> Iterator[Located]:
    yield str(path), file.read().decode("utf-8-sig")


def _json_lines(file: BinaryIO, path: Path) -> Iterator[Located]:
    number = 0
    while line := file.readline(LONGEST_RECORD):
        number += 1
        at = f"{path}:{number}"
        if len(line) == LONGEST_RECORD:
            raise ConfigError(f"{at}: longer than {LONGEST_RECORD} bytes; one JSON record per line is accepted")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{at}: not UTF-8 text ({error})") from None
        if text.strip():
            yield at, _parsed(text, at)


def _parsed(text: str, at: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    # a number of thousands of digits is a ValueError too
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{at}: not a JSON line ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return found


def _json_records(file: BinaryIO, path: Path) -> Iterator[Located]:
    """Read the elements of an array one by one; other files are read as JSON lines."""
    text = file.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] == b"[":
        yield from _array(_Ahead(io.TextIOWrapper(file, "utf-8-sig", newline="")), path)
    else:
        yield from _json_lines(file, path)


class _Ahead:
    """Text read in chunks, with the position and the line of the next character."""

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.held, self.at, self.line = stream, "", 0, 1
        self.decoder = json.JSONDecoder(object_pairs_hook=_object)

    def more(self, size: int) -> bool:
        read = self.stream.read(size)
        self.held, self.at = self.held[self.at :] + read, 0
        return bool(read)

    def next(self) -> str:
        """Next non-space character, without consuming it; empty at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in " \t\r\n":
                self.line += self.held[self.at] == "\n"
                self.at += 1
            if self.at < len(self.held) or not self.more(_CHUNK):
                return self.held[self.at : self.at + 1]

    def value(self) -> Any:
        """Next JSON value; raises ValueError for none."""
        size = _CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except ValueError:
                if len(self.held) - self.at > LONGEST_RECORD or not self.more(size):
                    raise
            else:
                if end < len(self.held):
                    break
                # a value at the end of a chunk may continue in the next one
                if not self.more(size):
                    end = len(self.held)
                    break
            size *= 2
        self.line += self.held.count("\n", self.at, end)
        self.at = end
        return value


def _array(text: _Ahead, path: Path) -> Iterator[Located]:
    text.next()
    text.at += 1
    closing = text.next() == "]"
    while not closing:
        at = f"{path}:{text.line}"
        try:
            yield at, text.value()
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{at}: not an element of a JSON array ({error})") from None
        mark = text.next()
        if mark not in (",", "]"):
            raise ConfigError(f"{path}:{text.line}: expected ',' or ']' in a JSON array, found {mark!r}")
        closing, text.at = mark == "]", text.at + 1
        text.next()
    if text.next():
        raise ConfigError(f"{path}:{text.line}: unexpected content after the end of the JSON array")


def _csv_rows(file: BinaryIO, path: Path) -> Iterator[Located]:
    csv.field_size_limit(LONGEST_RECORD)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    names: list[str] = []
    while True:
        at = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{at}: not CSV ({error})") from None
        if row is None:
            return
        if not names:
            names = row
            if len(set(names)) < len(names):
                raise ConfigError(f"{at}: the header names a column twice ({', '.join(names)})")
        elif len(row) == len(names):
            yield at, dict(zip(names, row))
        elif row:
            raise ConfigError(
                f"{at}: {len(row)} cells, but the header has {len(names)}; put a text with commas in double quotes"
            )


def _parquet_rows(path: Path, field: str | None) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        if field is not None and field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ConfigError(f"{path}: no column '{field}' (has: {names}); name the text column with 'field:'")
        batches = file.iter_batches(256, columns=None if field is None else [field])
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path}: not a parquet file ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def field_of(record: Any, field: str, at: str) -> Any:
    """Value of ``field`` of a record; :class:`ConfigError` lists the existing fields."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"{at}: {kind(record)}, not an object with a field '{field}'")
    if field not in record:
        raise ConfigError(f"{at}: no field '{field}' (has: {', '.join(record)}); name the text field with 'field:'")
    return record[field]
