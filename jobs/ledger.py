"""Which ids are finished, which are still to do, and which were named twice: a table of digests on disk.

The output files are the only record of progress; this table is made from them anew at every start, so that
neither the ids of a billion images nor a record that could disagree with the output has to be kept.
"""

from __future__ import annotations

import hashlib
import sqlite3
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from clipfleet.errors import JobError
from jobs.places import UNKNOWN, FileState


class State(IntEnum):
    """What DEST has of an id, and what is to become of it."""

    NEW = 0
    FINISHED = 1
    FAILED = 2  # finished with an error
    GONE = 3  # its file was not there any more
    REDO = 4  # to be taken out of DEST and done again
    LOST = 5  # to be marked as gone
    UNREAD = 6  # finished with an error that may have been its file system's, and have passed


class Known(NamedTuple):
    """What DEST has of an id, and the state that its file had then."""

    state: State
    file: FileState


class Ledger:
    """Digests of ids, what DEST has of them, and how often the source named them."""

    def __init__(self, path: Path) -> None:
        # A scratch file: it never outlives its process, so nothing of it needs to be durable.
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-65536"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(
            "CREATE TABLE ids (digest BLOB PRIMARY KEY, state INT, named INT, part INT, size INT, modified INT) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def record(self, name: str, state: State, part: int = 0, file: FileState = UNKNOWN) -> int | None:
        """Note that DEST has a row for this id in its output file number `part`. Returns the number of another one that has
        it too, if there is one."""
        try:
            self._db.execute("INSERT INTO ids VALUES (?, ?, 0, ?, ?, ?)", (_digest(name), state, part, *file))
        except sqlite3.IntegrityError:
            return int(self._db.execute("SELECT part FROM ids WHERE digest = ?", (_digest(name),)).fetchone()[0])
        return None

    def claim(self, name: str) -> Known:
        """Note that the source names this id, and say what DEST has of it. Raises JobError the second time."""
        state, named, *file = self._db.execute(
            "INSERT INTO ids VALUES (?, 0, 1, NULL, NULL, NULL) ON CONFLICT (digest) DO UPDATE SET named = named + 1 "
            "RETURNING state, named, size, modified",
            (_digest(name),),
        ).fetchone()
        if named > 1:
            raise JobError(f"id {name!r} stands in the source twice; ids must differ", id=name)
        return Known(State(state), FileState(*file))

    def mark(self, name: str, state: State) -> None:
        """Say what is to become of an id that DEST has."""
        self._db.execute("UPDATE ids SET state = ? WHERE digest = ?", (state, _digest(name)))

    def mark_unnamed(self) -> None:
        """Mark as lost what DEST has and the source has not named."""
        self._db.execute(
            "UPDATE ids SET state = ? WHERE named = 0 AND state IN (?, ?, ?)",
            (State.LOST, State.FINISHED, State.FAILED, State.UNREAD),
        )

    def state(self, name: str) -> State:
        """What is to become of an id that DEST has."""
        return State(self._db.execute("SELECT state FROM ids WHERE digest = ?", (_digest(name),)).fetchone()[0])

    def parts_to_change(self) -> list[int]:
        """The output files with rows to redo or to mark as gone."""
        rows = self._db.execute(
            "SELECT DISTINCT part FROM ids WHERE state IN (?, ?) ORDER BY part", (State.REDO, State.LOST)
        )
        return [part for (part,) in rows if part is not None]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
