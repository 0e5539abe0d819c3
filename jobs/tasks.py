"""What is to be done, as numbered files in the run's scratch folder: one a decode task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from clipfleet.errors import JobError
from jobs.items import Item

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("place", pa.binary()),
        ("row", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("whole", pa.int64()),  # bytes of the file that offset and length are in
        ("error", pa.string()),
        ("size", pa.int64()),
        ("modified", pa.int64()),  # microseconds since 1970
    ]
)


def write_tasks(items: Iterable[Item], folder: Path, rows_per_task: int) -> tuple[int, int]:
    """Write items as numbered files for the decode tasks. Returns how many files and how many items."""
    folder.mkdir()
    tasks = rows = 0
    for tasks, chunk in enumerate(_chunks(items, rows_per_task), start=1):
        rows += len(chunk)
        table = pa.Table.from_pylist([_task_row(item) for item in chunk], schema=SCHEMA)
        with pa.OSFile(str(task_file(folder, tasks - 1)), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
    return tasks, rows


def task_file(folder: Path, number: int) -> Path:
    return folder / f"{number:09d}.arrow"


def read_task(folder: Path, number: int) -> pa.Table:
    """The rows of one task. Raises JobError if its file is not there any more."""
    try:
        with pa.OSFile(str(task_file(folder, number)), "rb") as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"the job's own files in {str(folder.parent)!r} have gone or cannot be read: {error}") from error


def _task_row(item: Item) -> dict[str, object]:
    by_row = isinstance(item.place, int)
    offset, length, whole = item.section or (None, None, None)
    return {
        "id": item.id,
        "uri": item.uri,
        "place": None if by_row else item.place,
        "row": item.place if by_row else None,
        "offset": offset,
        "length": length,
        "whole": whole,
        "error": item.error,
        "size": item.state.size,
        "modified": item.state.modified,
    }


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
