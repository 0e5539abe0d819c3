"""Tables that name the images, one a row: Parquet (paths or bytes), CSV and JSON Lines (paths).

Paths are URIs, absolute, or relative to the manifest's folder. Ids are the id column's values as text, or the
paths as written, `#N` for row N (from 0) where there is none. A row whose path or bytes are null is a row with an error,
a row whose id is null stops the job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from clipfleet.errors import JobError, SettingsError
from jobs.items import BytesManifest, Item, Source
from jobs.options import EmbedOptions
from jobs.places import is_uri, local_path, printable, without_secrets

DEFAULT_PATH_COLUMN = "path"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*PARQUET, *_SEPARATORS, *JSON_LINES)
_ROWS = 8192
_BUFFER_BYTES = 2**20
_UNREADABLE = (OSError, ValueError, pa.ArrowException)

Row = tuple[str | None, str | None]  # id, path


def open_manifest(options: EmbedOptions) -> Source:
    """Open the manifest `options.source`. Raises SettingsError for columns that it does not have."""
    path = os.path.abspath(os.path.expanduser(local_path(options.source)))
    try:
        names = _column_names(path)
    except _UNREADABLE as error:
        raise SettingsError(f"cannot read the manifest {path!r}: {error}") from error
    content = options.bytes_column or options.path_column or DEFAULT_PATH_COLUMN
    for column in filter(None, (content, options.id_column)):
        if names.count(column) > 1:
            raise SettingsError(f"the manifest {path!r} has several columns {column!r}")
        if column not in names:
            raise SettingsError(f"the manifest {path!r} has no column {column!r}; it has {', '.join(names)}")
    if options.bytes_column is None:
        return Source(_items(path, options.id_column, content))
    if not path.lower().endswith(PARQUET):
        raise SettingsError(f"bytes are read from Parquet alone, not from {path!r}; give a path column")
    with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
        status = os.fstat(opened.fileno())
        kind = file.schema_arrow.field(content).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SettingsError(f"column {content!r} of {path!r} holds {kind}, not binary")
    assert options.id_column is not None  # EmbedOptions refuses bytes without it
    manifest = BytesManifest(path, content, status.st_size, status.st_mtime_ns)
    return Source(_items(path, options.id_column, None, manifest), manifest)


@contextmanager
def opened_as_planned(manifest: BytesManifest) -> Iterator[tuple[pq.ParquetFile, Callable[[], None]]]:
    """The file, and a check to call after each reading of it: both raise JobError if it is not what it was at first."""
    with open(manifest.path, "rb") as opened:

        def check() -> None:
            status = os.fstat(opened.fileno())
            if (status.st_size, status.st_mtime_ns) != (manifest.size, manifest.modified):
                raise JobError(
                    f"the manifest {manifest.path!r} was changed while the job ran; run the command again. "
                    "What is finished is kept"
                )

        check()
        with _parquet(opened) as file:
            yield file, check


def _parquet(file: str | BinaryIO) -> pq.ParquetFile:
    """A Parquet file of which little is in memory at once: a page, in which pyarrow puts 1,024 rows.

    By default pyarrow reads whole columns of a row group, which may be all of the file.
    """
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)


def _items(
    manifest: str, id_column: str | None, path_column: str | None, planned: BytesManifest | None = None
) -> Iterator[Item]:
    folder = os.path.dirname(manifest)
    rows = _planned_rows(planned, id_column) if planned and id_column else _rows(manifest, id_column, path_column)
    for number, (name, path) in enumerate(rows):
        path = path or None  # an empty one would be the manifest's folder
        if id_column is None and not name:
            name = f"#{number}"
        if name is None:
            raise JobError(f"row {number} of {manifest!r} has no id: column {id_column!r} is null there")
        if path_column is None:
            yield Item(printable(name), f"{printable(manifest)}#{number}", number)
        else:
            place = None if path is None else resolve(path, folder)
            yield Item(printable(name), None if place is None else printable(without_secrets(place)), _encoded(place))


def resolve(path: str, folder: str) -> str:
    """A manifest's path as a local path or the URI of another file system."""
    place = local_path(path)
    return place if is_uri(place) else os.path.join(folder, place)


def _encoded(path: str | None) -> bytes | None:
    try:
        return None if path is None else os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair: no file can have this name
        return None


def _column_names(path: str) -> list[str]:
    suffix = Path(path).suffix.lower()
    if suffix in PARQUET:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.names
    if suffix in _SEPARATORS:
        with csv.open_csv(path, parse_options=_separated(suffix)) as reader:
            return reader.schema.names
    names: dict[str, None] = {}
    for _, row in islice(_json_lines(path), _ROWS):  # rows may differ; a slip in a name shows within the first ones
        names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    return list(names)


def _separated(suffix: str) -> csv.ParseOptions:
    return csv.ParseOptions(delimiter=_SEPARATORS[suffix], newlines_in_values=True)


def _rows(path: str, id_column: str | None, path_column: str | None) -> Iterator[Row]:
    columns = [column for column in (id_column or path_column, path_column) if column]
    try:
        if Path(path).suffix.lower() in JSON_LINES:
            yield from _json_rows(path, columns)
            return
        for batch in _batches(path, sorted(set(columns))):
            texts = [_texts(batch.column(column)) for column in columns]
            yield from zip(texts[0], texts[-1] if path_column else [None] * len(texts[0]), strict=True)
    except _UNREADABLE as error:
        raise JobError(f"cannot read the manifest {path!r}: {error}") from error


def _planned_rows(manifest: BytesManifest, id_column: str) -> Iterator[Row]:
    try:
        with opened_as_planned(manifest) as (file, check):
            for batch in file.iter_batches(_ROWS, columns=[id_column]):
                check()
                yield from ((name, None) for name in _texts(batch.column(id_column)))
    except _UNREADABLE as error:
        raise JobError(f"cannot read the manifest {manifest.path!r}: {error}") from error


def _batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    suffix = Path(path).suffix.lower()
    if suffix in PARQUET:
        with _parquet(path) as file:
            yield from file.iter_batches(_ROWS, columns=columns)
    else:  # as text, so that 007 stays 007
        convert = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        with csv.open_csv(path, parse_options=_separated(suffix), convert_options=convert) as reader:
            yield from reader


def _texts(column: pa.Array) -> list[str | None]:
    return column.cast(pa.string()).to_pylist()


def _json_rows(path: str, columns: list[str]) -> Iterator[Row]:
    for number, row in _json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        values = [row.get(column) for column in columns]
        if any(isinstance(value, (dict, list)) for value in values):
            raise ValueError(f"line {number}: ids and paths are texts or numbers")
        texts = [None if value is None else str(value) for value in values]
        yield texts[0], texts[-1]


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSON Lines file, with their lines' numbers from 1. Raises ValueError that names the line."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_value(line, number)


def _json_value(line: str, number: int) -> Any:
    try:
        line.encode()  # bytes that are no UTF-8 were read as surrogates
        return json.loads(line)
    except UnicodeEncodeError as error:
        raise ValueError(f"line {number}, column {error.start + 1}: no UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.pos + 1}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"line {number} is nested too deeply") from error
