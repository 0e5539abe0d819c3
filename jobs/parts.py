"""One output file: its columns, how it is written whole, and how rows are taken out of it or marked.

    parquet   part-IDS.parquet                          all columns, the vectors among them
    npy       part-IDS-CONTENT.npy, part-IDS.parquet    the vectors; then all other columns, and each vector's row

IDS and CONTENT are digests. The Parquet file is renamed into place last and names its .npy, so that rename alone decides
what DEST holds; an .npy that no Parquet file names is a leftover.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfleet.errors import JobError
from jobs.destination import GO_ON, Claim

PREFIX = "clipfleet."
PARQUET, NPY = "parquet", "npy"
FORMATS = (PARQUET, NPY)
GONE = "gone"  # in the column `error`: the file was embedded once and is not there any more
_NPY_KEY = f"{PREFIX}npy".encode()
_OUR_NPY = re.compile(r"part-[0-9a-f]{24}-[0-9a-f]{16}\.npy")


@dataclass(frozen=True)
class Origin:
    """What made the vectors, and where they are as well; stands in every file's metadata."""

    fingerprint: str
    model: str
    revision: str | None
    precision: str
    engine: str
    jpegs: str = "whole"  # or reduced
    collection: str | None = None

    def metadata(self) -> dict[str, str]:
        return {f"{PREFIX}{name}": value or "" for name, value in vars(self).items()}


def schema(dimension: int, origin: Origin, format: str = PARQUET) -> pa.Schema:
    """The columns of every file. `embedding`, or `npy` and `row`, are null where `error` is not."""
    vectors = {
        PARQUET: [pa.field("embedding", pa.list_(pa.float32(), dimension))],
        NPY: [pa.field("npy", pa.string()), pa.field("row", pa.int32())],
    }
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            ("uri", pa.string()),
            *vectors[format],
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("error", pa.string()),
            ("size", pa.int64()),
            ("modified", pa.timestamp("us", tz="UTC")),
        ],
        metadata=origin.metadata(),
    )


def format_of(found: pa.Schema) -> str:
    """Which format a file has, by its columns."""
    return PARQUET if "embedding" in found.names else NPY


def npy_of(found: pa.Schema) -> str | None:
    """The name of the .npy beside an index, if it has one."""
    name = (found.metadata or {}).get(_NPY_KEY)
    return name.decode() if name else None


def write(claim: Claim, origin: Origin, format: str, rows: pa.Table, vectors: np.ndarray) -> None:
    """Publish one file of `rows` (id, uri, width, height, error, size, modified) and the vectors (k, d) of those without
    error.

    The file's name follows from the ids, so a repeated write replaces the first. Raises JobError if it cannot be written.
    """
    good = rows.column("error").is_null().to_numpy()
    digest = hashlib.sha256()
    for name in rows.column("id").to_pylist():
        digest.update(name.encode() + b"\0")
    stem = f"part-{digest.hexdigest()[:24]}"
    target = schema(vectors.shape[1], origin, format)
    if format == PARQUET:
        spread = np.zeros((rows.num_rows, vectors.shape[1]), np.float32)  # (n, d)
        spread[good] = vectors
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(spread.ravel()), spread.shape[1], mask=pa.array(~good))
        _publish(claim, _arranged(rows.append_column("embedding", embedding), target), f"{stem}.parquet")
    else:
        _publish_index(claim, stem, rows, good, vectors, target)


def rewrite(claim: Claim, name: str, keep: np.ndarray, gone: np.ndarray) -> None:
    """Keep the rows `keep` (n,) of a file alone, and of these mark the rows `gone` (n,): one step for whoever reads it."""
    with reading(claim.folder / name) as file:
        table = file.read()
    format, old_npy, new_npy = format_of(table.schema), npy_of(table.schema), npy_of(table.schema)
    if not keep.any():
        claim.remove(name)
        new_npy = None
    elif not keep.all() or gone.any():
        good = table.column("error").is_null().to_numpy() & ~gone
        table = _with(
            table, "error", pc.call_function("if_else", [pa.array(gone), pa.scalar(GONE), table.column("error")])
        )
        if format == PARQUET:
            nothing = pa.scalar(None, table.schema.field("embedding").type)
            embedding = pc.call_function("if_else", [pa.array(gone), nothing, table.column("embedding")])
            _publish(claim, _with(table, "embedding", embedding).filter(pa.array(keep)), name)
        else:
            vectors = _kept_vectors(claim.folder, table, good & keep)
            new_npy = _publish_index(
                claim, name.removesuffix(".parquet"), table.filter(pa.array(keep)), good[keep], vectors, table.schema
            )

    if old_npy not in (None, new_npy):
        claim.remove(old_npy)


def _with(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), column)


def _kept_vectors(folder: Path, table: pa.Table, wanted: np.ndarray) -> np.ndarray:
    npy = npy_of(table.schema)
    if npy is None:  # all rows had failed
        return np.zeros((0, 0), np.float32)
    with _writing(folder):
        vectors = np.load(folder / npy)
    return vectors[table.filter(pa.array(wanted)).column("row").to_numpy()]


def _publish_index(
    claim: Claim, stem: str, rows: pa.Table, good: np.ndarray, vectors: np.ndarray, target: pa.Schema
) -> str | None:
    """Publish the vectors (k, d) of the `good` (n,) of n rows, then the rows. Returns the name of the .npy, if any."""
    npy = None
    if len(vectors):
        # By its content, so that it never changes below an index that names it.
        npy = f"{stem}-{hashlib.sha256(vectors.tobytes()).hexdigest()[:16]}.npy"
        with _draft(claim, npy) as draft:
            with draft.open("wb") as file:
                np.save(file, np.ascontiguousarray(vectors, np.float32))
            claim.publish(draft, npy)
    number = np.cumsum(good) - 1
    columns = {
        "npy": pa.array([npy if is_good else None for is_good in good], pa.string()),
        "row": pa.array(number, pa.int32(), mask=~good),
    }
    for name, column in columns.items():
        rows = rows.drop_columns([name]) if name in rows.column_names else rows
        rows = rows.append_column(name, column)
    named = target.with_metadata({**(target.metadata or {}), _NPY_KEY: (npy or "").encode()})
    _publish(claim, _arranged(rows, named), f"{stem}.parquet")
    return npy


def _arranged(rows: pa.Table, target: pa.Schema) -> pa.Table:
    return rows.select(target.names).cast(target).replace_schema_metadata(target.metadata)


def _publish(claim: Claim, table: pa.Table, name: str) -> None:
    with _draft(claim, name) as draft:
        pq.write_table(table, draft)
        claim.publish(draft, name)


@contextmanager
def _draft(claim: Claim, name: str) -> Iterator[Path]:
    draft = claim.scratch / f"{name}.{np.random.SeedSequence().entropy:x}"  # a retry may run beside the first try
    try:
        with _writing(claim.folder):
            yield draft
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: Exception) -> JobError:
    """What to say when writing to DEST failed."""
    if not folder.is_dir():
        return JobError(f"DEST {str(folder)!r} has vanished while the job ran. Bring it back, or start anew")
    number = getattr(error, "errno", None)
    return JobError(f"cannot write to DEST {str(folder)!r}: {os.strerror(number) if number else error}. {GO_ON}")


@contextmanager
def reading(path: Path) -> Iterator[pq.ParquetFile]:
    """An output file. Raises JobError if it is none."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise JobError(
            f"{str(path)!r} cannot be read as Parquet: {error}. Remove it and start again: its images are done anew"
        ) from error


def parts(folder: Path) -> list[Path]:
    """The output files, in a fixed order."""
    return sorted(folder.glob("part-*.parquet"))


def remove_unnamed(claim: Claim) -> None:
    """Remove each .npy of ours that no Parquet file names: leftovers of a killed job. DEST must be known to be ours."""
    stray = [path for path in sorted(claim.folder.glob("part-*.npy")) if _OUR_NPY.fullmatch(path.name)]
    if not stray:
        return
    named: set[str | None] = set()
    for path in parts(claim.folder):
        with reading(path) as file:
            named.add(npy_of(file.schema_arrow))
    with _writing(claim.folder):
        for path in stray:
            if path.name not in named:
                claim.remove(path.name)
