"""What a run has to do: the source's inputs, less what DEST holds of them; and DEST made ready for the rest."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import ImageNotFound, ImageUnreadable, JobError, SettingsError
from jobs import output, parts
from jobs.destination import Claim
from jobs.items import Item, Source
from jobs.ledger import Known, Ledger, State
from jobs.options import EmbedOptions
from jobs.places import UNKNOWN, FileState, look
from jobs.sources import TAR
from jobs.tasks import write_tasks

PIXEL_BYTES = 32 * 2**20  # of one output file's images; a block of Ray Data holds one file's
_FILES_PER_BYTES_TASK = 16  # a task reads a manifest's row group from its start, so it should use much of it
_LOOKS = 16  # at once: another machine's answer takes milliseconds
_LOOKED_AT = 1024  # inputs whose answers wait for the slowest of them

_MAY_PASS = (ImageNotFound.code, ImageUnreadable.code)  # of a file system that was away, too

Retire = Callable[[list[str]], None]


@dataclass(frozen=True)
class Work:
    """What a run has to do."""

    source: Source
    tasks: Path
    task_count: int
    rows_per_file: int
    pending: int
    skipped: int
    before: int  # rows that DEST holds and keeps


def plan(
    options: EmbedOptions, source: Source, pixels: PixelSpec, origin: parts.Origin, claimed: Claim, retire: Retire
) -> Work:
    """Write down what is to be done, take the rows that are done again out of DEST, and mark those whose files have gone.

    `retire` gets the ids of the latter before. Raises SettingsError for a source without images, JobError where DEST is not
    this job's or cannot be written.
    """
    height, width = pixels.size
    rows_per_file = max(1, min(options.rows_per_file, PIXEL_BYTES // (height * width * 3)))
    rows_per_task = rows_per_file * (_FILES_PER_BYTES_TASK if source.manifest else 1)
    tasks = claimed.scratch / "tasks"
    try:
        with Ledger(claimed.scratch / "ids.sqlite") as ledger:
            files, before = _record_finished(ledger, options, source, claimed, origin)
            parts.remove_unnamed(claimed)  # not earlier: only now is DEST known to be ours
            choice = _Choice(ledger, options)
            task_count, rows = write_tasks(choice.pending(source.items), tasks, rows_per_task)
            if rows + choice.skipped == 0:
                raise SettingsError(f"{options.source!r} holds no images")
            if options.changed and not choice.unread:
                ledger.mark_unnamed()
            changing = ledger.parts_to_change()
            if changing:
                (claimed.folder / output.SUMMARY).unlink(missing_ok=True)  # DEST is not finished from here on
            for number in changing:
                before -= output.change_rows(claimed, files[number], ledger.state, retire)
    except (OSError, sqlite3.Error) as error:
        raise parts.cannot_write(claimed.folder, error) from error
    return Work(source, tasks, task_count, rows_per_file, rows, choice.skipped, before)


def _record_finished(
    ledger: Ledger, options: EmbedOptions, source: Source, claimed: Claim, origin: parts.Origin
) -> tuple[list[str], int]:
    """Enter DEST's rows; returns the files' names by their numbers, and how many rows there are."""
    files: list[str] = []
    count = 0
    afresh = source.shards and (options.retry_errors or options.changed)
    for file, rows in output.finished(claimed.folder, origin, options.format):
        for name, error, state in rows:
            count += 1
            if error is None:
                known = State.FINISHED
            elif afresh and name.lower().endswith(TAR):  # a damaged tar's own row, which goes when the tar is mended
                known = State.REDO
            elif error in _MAY_PASS:
                known = State.UNREAD
            else:
                known = State.GONE if error == parts.GONE else State.FAILED
            other = ledger.record(name, known, len(files), state)
            if other is not None:
                raise JobError(
                    f"DEST {str(claimed.folder)!r} holds id {name!r} twice, in {[*files, file][other]} and in {file}; "
                    "remove one of these files and start again"
                )
        files.append(file)
    return files, count


@dataclass
class _Choice:
    """Which inputs are to be embedded; counts the others."""

    ledger: Ledger
    options: EmbedOptions
    skipped: int = 0
    unread: bool = False  # a tar could not be read whole, so its members cannot be called gone
    there: int = 0  # files, and how many of those that the source names are not
    away: int = 0

    def pending(self, items: Iterable[Item]) -> Iterator[Item]:
        """The inputs to embed. With `changed`, raises JobError where none of the files is there."""
        for item, now in _looked_at(items) if self.options.changed else ((item, None) for item in items):
            self.unread = self.unread or (item.error is not None and item.id.lower().endswith(TAR))
            if self.options.changed and _has_file(item):
                self.there, self.away = self.there + (now is not None), self.away + (now is None)
            known = self.ledger.claim(item.id)
            if self._is_wanted(known, item, now):
                if known.state is not State.NEW:
                    self.ledger.mark(item.id, State.REDO)
                yield item
            else:
                self.skipped += 1
                if self._is_away(item, now) and known.state is not State.GONE:
                    self.ledger.mark(item.id, State.LOST)
        if self.away and not self.there:
            raise JobError(
                f"none of the {self.away} files of {self.options.source!r} is there; nothing was changed. Is what holds "
                "them mounted?"
            )

    def _is_wanted(self, known: Known, item: Item, now: FileState | None) -> bool:
        if known.state in (State.NEW, State.REDO):
            return True
        if self._is_away(item, now):
            return False
        if known.state in (State.FAILED, State.UNREAD) and self.options.retry_errors:
            return True
        if not self.options.changed:
            return False
        if known.state is State.UNREAD and _has_file(item) and item.error is None:
            return True
        # A file system that does not answer is no reason to take a row for outdated.
        return known.state is State.GONE or (_has_file(item) and now not in (UNKNOWN, known.file))

    def _is_away(self, item: Item, now: FileState | None) -> bool:
        return self.options.changed and _has_file(item) and now is None


def _has_file(item: Item) -> bool:
    return isinstance(item.place, bytes)


def _looked_at(items: Iterable[Item]) -> Iterator[tuple[Item, FileState | None]]:
    """Each input, and the state of its file; None where there is none."""
    rest = iter(items)
    with ThreadPoolExecutor(_LOOKS) as pool:
        while some := list(islice(rest, _LOOKED_AT)):
            for item, now in zip(some, pool.map(_look, some), strict=True):
                yield item._replace(state=now or item.state), now


def _look(item: Item) -> FileState | None:
    if not isinstance(item.place, bytes) or item.state.size is not None:
        return item.state
    return look(item.place.decode("utf-8", "surrogateescape"))
