"""The Parquet files of DEST: written whole, read for what is finished, rewritten without failed rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfleet.errors import FingerprintMismatch, JobError
from jobs.destination import Claim

PREFIX = "clipfleet."
SUMMARY = "_clipfleet.json"


@dataclass(frozen=True)
class Origin:
    """What made the vectors; stands in every file's metadata."""

    fingerprint: str
    model: str
    revision: str | None
    precision: str
    engine: str
    jpegs: str = "whole"  # or reduced

    def metadata(self) -> dict[str, str]:
        return {f"{PREFIX}{name}": value or "" for name, value in vars(self).items()}


def schema(dimension: int, origin: Origin) -> pa.Schema:
    """The columns of every file; `embedding` is null where `error` is not."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            ("uri", pa.string()),
            ("embedding", pa.list_(pa.float32(), dimension)),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("error", pa.string()),
        ],
        metadata=origin.metadata(),
    )


def write_part(claim: Claim, origin: Origin, rows: pa.Table, vectors: np.ndarray) -> None:
    """Publish one file of `rows` (id, uri, width, height, error) and the vectors (k, d) of those without error.

    The file's name follows from the ids, so a repeated write replaces the first.
    """
    good = rows.column("error").is_null().to_numpy()
    spread = np.zeros((rows.num_rows, vectors.shape[1]), np.float32)  # (n, d)
    spread[good] = vectors
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(spread.ravel()), spread.shape[1], mask=pa.array(~good))
    target = schema(spread.shape[1], origin)
    table = rows.append_column("embedding", embedding).select(target.names).cast(target)
    digest = hashlib.sha256()
    for name in rows.column("id").to_pylist():
        digest.update(name.encode() + b"\0")
    _publish(claim, table.replace_schema_metadata(target.metadata), f"part-{digest.hexdigest()[:24]}.parquet")


def _publish(claim: Claim, table: pa.Table, name: str) -> None:
    draft = claim.scratch / f"{name}.{np.random.SeedSequence().entropy:x}"  # a retry may run beside the first try
    try:
        pq.write_table(table, draft)
        claim.publish(draft, name)
    finally:
        draft.unlink(missing_ok=True)


def parts(folder: Path) -> list[Path]:
    """The output files, in a fixed order."""
    return sorted(folder.glob("part-*.parquet"))


def finished(folder: Path, origin: Origin) -> Iterator[tuple[str, str, str | None]]:
    """(file name, id, error) of every finished row. Raises FingerprintMismatch, or JobError for files not ours."""
    for path in parts(folder):
        with _open(path) as file:
            _check_origin(path, file, origin)
            table = file.read(["id", "error"])
        for name, error in zip(table.column("id").to_pylist(), table.column("error").to_pylist(), strict=True):
            yield path.name, name, error


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise JobError(
            f"{str(path)!r} cannot be read as Parquet: {error}. Remove it and start again: its images are done anew"
        ) from error


def _check_origin(path: Path, file: pq.ParquetFile, origin: Origin) -> None:
    metadata = file.schema_arrow.metadata or {}
    found = metadata.get(f"{PREFIX}fingerprint".encode(), b"").decode()
    if not found:
        raise JobError(f"{str(path)!r} was not written by clipfleet; choose another DEST")
    if found != origin.fingerprint:
        model = metadata.get(f"{PREFIX}model".encode(), b"?").decode()
        raise FingerprintMismatch(
            f"{str(path.parent)!r} holds vectors of {model} with fingerprint {found}; those of {origin.model} have "
            f"{origin.fingerprint} and cannot be compared with them. Choose another DEST",
            found=found,
            expected=origin.fingerprint,
        )


def drop_rows(claim: Claim, name: str, unwanted: Callable[[str], bool]) -> int:
    """Take the failed rows whose id is `unwanted` out of a file, in one step. Returns how many."""
    with _open(claim.folder / name) as file:
        table = file.read()
    errors = table.column("error").to_pylist()
    keep = [
        error is None or not unwanted(row) for row, error in zip(table.column("id").to_pylist(), errors, strict=True)
    ]
    if not any(keep):
        claim.remove(name)
    elif not all(keep):
        _publish(claim, table.filter(pa.array(keep)), name)
    return len(keep) - sum(keep)


@dataclass(frozen=True)
class Count:
    """What DEST holds."""

    rows: int
    errors: dict[str, int]
    precisions: list[str]
    engines: list[str]
    jpegs: list[str]

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def count(folder: Path) -> Count:
    """Count the rows of all files, and the failed ones by their code."""
    rows = 0
    errors: dict[str, int] = {}
    found: dict[str, set[str]] = {"precision": set(), "engine": set(), "jpegs": set()}
    for path in parts(folder):
        with _open(path) as file:
            rows += file.metadata.num_rows
            for name, values in found.items():
                values.add((file.schema_arrow.metadata or {}).get(f"{PREFIX}{name}".encode(), b"").decode())
            for code in file.read(["error"]).column("error").drop_null().to_pylist():
                errors[code] = errors.get(code, 0) + 1
    return Count(rows, dict(sorted(errors.items())), *map(sorted, found.values()))


def write_summary(claim: Claim, summary: dict[str, object]) -> None:
    """Publish `_clipfleet.json`, which says that DEST is finished."""
    draft = claim.scratch / SUMMARY
    draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    claim.publish(draft, SUMMARY)
