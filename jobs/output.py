"""All that DEST holds: what is finished, what is to be taken out or marked, and what there is in the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfleet.errors import FingerprintMismatch, JobError
from jobs.destination import Claim
from jobs.ledger import State
from jobs.parts import GONE, PREFIX, Origin, cannot_write, format_of, parts, reading, rewrite
from jobs.places import UNKNOWN, FileState

SUMMARY = "_clipfleet.json"

Finished = tuple[str, str | None, FileState]  # id, error, the state that its file had


def finished(folder: Path, origin: Origin, format: str) -> Iterator[tuple[str, Iterator[Finished]]]:
    """Each file's name, and its rows. Raises FingerprintMismatch, or JobError for files that are not this job's."""
    for path in parts(folder):
        with reading(path) as file:
            _check_origin(path, file, origin, format)
            names = file.schema_arrow.names
            table = file.read([name for name in ("id", "error", "size", "modified") if name in names])
        yield path.name, _rows(table)


def _rows(table: pa.Table) -> Iterator[Finished]:
    states: Iterator[FileState] | list[FileState] = [UNKNOWN] * table.num_rows  # of a version that kept none
    if "modified" in table.column_names:
        modified = table.column("modified").cast(pa.int64()).to_pylist()
        states = map(FileState, table.column("size").to_pylist(), modified)
    yield from zip(table.column("id").to_pylist(), table.column("error").to_pylist(), states, strict=True)


def count_rows_of(folder: Path, model: str, fingerprint: str) -> int:
    """How many rows DEST has. Raises FingerprintMismatch if they are by another checkpoint, JobError if there are none."""
    rows = 0
    for path in parts(folder):
        with reading(path) as file:
            _check_checkpoint(path, _metadata(file), model, fingerprint)
            rows += file.metadata.num_rows
    if not rows:
        raise JobError(f"{str(folder)!r} holds no rows of a job")
    return rows


def _metadata(file: pq.ParquetFile) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}


def _check_checkpoint(path: Path, metadata: Mapping[str, str], model: str, fingerprint: str) -> None:
    found = metadata.get(f"{PREFIX}fingerprint", "")
    if not found:
        raise JobError(f"{str(path)!r} was not written by clipfleet; choose another DEST")
    if found != fingerprint:
        raise FingerprintMismatch(
            f"{str(path.parent)!r} holds vectors of {metadata.get(f'{PREFIX}model', '?')} with fingerprint {found}; those of "
            f"{model} have {fingerprint} and cannot be compared with them. Choose another DEST",
            found=found,
            expected=fingerprint,
        )


def _check_origin(path: Path, file: pq.ParquetFile, origin: Origin, format: str) -> None:
    metadata = _metadata(file)
    _check_checkpoint(path, metadata, origin.model, origin.fingerprint)
    if (there := format_of(file.schema_arrow)) != format:
        raise JobError(
            f"{str(path.parent)!r} holds format {there}, not {format}; give --format {there}, or another DEST"
        )
    collection = metadata.get(f"{PREFIX}collection", "")
    if collection != (origin.collection or ""):
        kept = (
            f"rows are in the Qdrant collection {collection!r} too"
            if collection
            else "rows are in no Qdrant collection"
        )
        asked = f"in {origin.collection!r}" if origin.collection else "in none"
        raise JobError(f"{str(path.parent)!r}: its {kept}, and new ones would be {asked}; choose another DEST")


def change_rows(claim: Claim, name: str, state: Callable[[str], State], before: Callable[[list[str]], None]) -> int:
    """Take the rows to REDO out of a file and mark the LOST ones as gone, in one step. Returns how many are out.

    `before` gets the ids of the LOST ones first. Those to REDO are replaced, in a Qdrant collection too, when they are done.
    """
    with reading(claim.folder / name) as file:
        ids = file.read(["id"]).column("id").to_pylist()
    states = np.array([state(row) for row in ids])
    redo, lost = states == State.REDO, states == State.LOST
    before([row for row, is_lost in zip(ids, lost, strict=True) if is_lost])
    rewrite(claim, name, ~redo, lost)
    return int(redo.sum())


@dataclass
class Count:
    """What DEST holds. `errors` counts the failed rows by their code."""

    rows: int = 0
    gone: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, set[str]] = field(default_factory=lambda: {"precision": set(), "engine": set(), "jpegs": set()})

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def count(folder: Path) -> Count:
    """Count the rows of all files."""
    held = Count()
    for path in parts(folder):
        with reading(path) as file:
            held.rows += file.metadata.num_rows
            for name, values in held.made_by.items():
                values.add((file.schema_arrow.metadata or {}).get(f"{PREFIX}{name}".encode(), b"").decode())
            for code in file.read(["error"]).column("error").drop_null().to_pylist():
                if code == GONE:
                    held.gone += 1
                else:
                    held.errors[code] = held.errors.get(code, 0) + 1
    held.errors = dict(sorted(held.errors.items()))
    return held


def write_summary(claim: Claim, summary: dict[str, object]) -> None:
    """Publish `_clipfleet.json`, which says that DEST is finished."""
    draft = claim.scratch / SUMMARY
    try:
        draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        claim.publish(draft, SUMMARY)
    except OSError as error:
        raise cannot_write(claim.folder, error) from error
