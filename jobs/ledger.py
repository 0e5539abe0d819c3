"""Which ids are finished, which are still to do, and which were named twice: a table of digests on disk.

The output files are the only record of progress; this table is made from them anew at every start, so that
neither the ids of a billion images nor a record that could disagree with the output has to be kept.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from clipfleet.errors import JobError
from jobs.sources import Item

TASK_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("place", pa.binary()), ("row", pa.int64())])


class State(IntEnum):
    NEW = 0
    FINISHED = 1
    FAILED = 2  # finished with an error


class Ledger:
    """Digests of ids, what DEST has of them, and how often the source named them."""

    def __init__(self, path: Path) -> None:
        # A scratch file: it never outlives its process, so nothing of it needs to be durable.
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-65536"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, state INT, named INT) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def record(self, name: str, state: State) -> None:
        """Note that DEST has a row for this id. Raises JobError if it has two."""
        try:
            self._db.execute("INSERT INTO ids VALUES (?, ?, 0)", (_digest(name), state))
        except sqlite3.IntegrityError:
            raise JobError(f"DEST holds id {name!r} twice; remove one of its files and start again") from None

    def claim(self, name: str) -> State:
        """Note that the source names this id, and say what DEST has of it. Raises JobError the second time."""
        state, named = self._db.execute(
            "INSERT INTO ids VALUES (?, 0, 1) ON CONFLICT (digest) DO UPDATE SET named = named + 1 RETURNING state, named",
            (_digest(name),),
        ).fetchone()
        if named > 1:
            raise JobError(f"id {name!r} stands in the source twice; ids must differ", id=name)
        return State(state)

    def is_named(self, name: str) -> bool:
        """Whether the source named this id."""
        found = self._db.execute("SELECT named FROM ids WHERE digest = ?", (_digest(name),)).fetchone()
        return found is not None and found[0] > 0


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def write_tasks(items: Iterable[Item], folder: Path, rows_per_task: int) -> tuple[int, int]:
    """Write items as numbered files for the decode tasks. Returns how many files and how many items."""
    folder.mkdir()
    tasks = rows = 0
    for tasks, chunk in enumerate(_chunks(items, rows_per_task), start=1):
        rows += len(chunk)
        table = pa.Table.from_pylist([_task_row(item) for item in chunk], schema=TASK_SCHEMA)
        with pa.OSFile(str(task_file(folder, tasks - 1)), "wb") as sink, pa.ipc.new_file(sink, TASK_SCHEMA) as writer:
            writer.write_table(table)
    return tasks, rows


def task_file(folder: Path, number: int) -> Path:
    return folder / f"{number:09d}.arrow"


def read_task(folder: Path, number: int) -> pa.Table:
    """The rows (id, uri, place, row) of one task."""
    with pa.OSFile(str(task_file(folder, number)), "rb") as file:
        return pa.ipc.open_file(file).read_all()


def _task_row(item: Item) -> dict[str, object]:
    by_row = isinstance(item.place, int)
    return {
        "id": item.id,
        "uri": item.uri,
        "place": None if by_row else item.place,
        "row": item.place if by_row else None,
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
