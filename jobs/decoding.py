"""The decode tasks: a numbered file of inputs in, pixels out, one row for each output file to come.

A row carries all images of one output file. Ray Data may cut and join its blocks between rows only, so an
output file's images stay together whatever their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfleet.checkpoint import PixelSpec
from clipfleet.decode_process import DecodeProcess, Reply, Uri
from clipfleet.errors import ClipfleetError, ImageEmpty, ImageNotFound, JobError
from clipfleet.images import ImageLimits
from jobs.ledger import read_task
from jobs.sources import is_uri

Outcome = tuple[int, int] | str  # (width, height) or an error's code
Content = Path | Uri | bytes | str  # where an image is, its bytes, or the code of an error


@dataclass(frozen=True)
class DecodePlan:
    """What a decode task has to know."""

    tasks: Path
    spec: PixelSpec
    limits: ImageLimits
    rows_per_file: int
    manifest: str | None
    bytes_column: str | None


@lru_cache(maxsize=1)
def _process(spec: PixelSpec, limits: ImageLimits) -> DecodeProcess:
    return DecodeProcess(spec, limits)  # lives as long as Ray's worker, over many tasks


def decode_tasks(batch: dict[str, np.ndarray], plan: DecodePlan) -> Iterator[pa.Table]:
    """Decode the tasks numbered `batch["item"]`. Yields rows (rows: Arrow file, pixels: uint8 of the good ones)."""
    for number in batch["item"]:
        table = read_task(plan.tasks, int(number))
        contents = _contents(table, plan)
        for start in range(0, table.num_rows, plan.rows_per_file):
            yield _decode(table.slice(start, plan.rows_per_file), contents, plan)


def _decode(table: pa.Table, contents: Iterator[Content], plan: DecodePlan) -> pa.Table:
    process = _process(plan.spec, plan.limits)
    pixels = np.empty((table.num_rows, *plan.spec.size, 3), np.uint8)  # (n, H, W, 3)
    outcomes: list[Outcome] = []
    good = 0
    for _ in range(table.num_rows):
        content = next(contents)
        outcome = content if isinstance(content, str) else _outcome(process.decode_into(content, pixels[good]))
        good += not isinstance(outcome, str)
        outcomes.append(outcome)
    sizes = [(None, None, outcome) if isinstance(outcome, str) else (*outcome, None) for outcome in outcomes]
    rows = table.select(["id", "uri"])
    for column, name in enumerate(("width", "height", "error")):
        kind = pa.string() if name == "error" else pa.int32()
        rows = rows.append_column(name, pa.array([size[column] for size in sizes], kind))
    return _row(rows, pixels[:good])


def _outcome(reply: Reply) -> Outcome:
    return reply.code if isinstance(reply, ClipfleetError) else reply


def _row(rows: pa.Table, pixels: np.ndarray) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    offsets = pa.py_buffer(np.array([0, pixels.nbytes], np.int64))
    content = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)])
    return pa.table({"rows": pa.array([sink.getvalue().to_pybytes()]), "pixels": content})


def unpack(row: int, batch: pa.Table, size: tuple[int, int]) -> tuple[pa.Table, np.ndarray]:
    """The inverse: one row's table (id, uri, width, height, error) and the good ones' pixels (k, H, W, 3) uint8."""
    rows = pa.ipc.open_stream(batch.column("rows")[row].as_buffer()).read_all()
    pixels = np.frombuffer(batch.column("pixels")[row].as_buffer(), np.uint8)
    return rows, pixels.reshape(-1, *size, 3)


def _contents(table: pa.Table, plan: DecodePlan) -> Iterator[Content]:
    if plan.manifest is None or plan.bytes_column is None:
        return map(_locate, table.column("place").to_pylist())
    return _from_manifest(plan.manifest, plan.bytes_column, table.column("row").to_pylist())


def _locate(place: bytes | None) -> Content:
    if place is None:
        return ImageNotFound.code
    path = place.decode("utf-8", "surrogateescape")
    return Uri(path) if is_uri(path) else Path(path)


def _from_manifest(manifest: str, column: str, wanted: list[int]) -> Iterator[Content]:
    """The bytes in rows `wanted` (ascending) of a Parquet file, read once from the first row group that has one."""
    try:
        with pq.ParquetFile(manifest) as file:
            starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            first, last = np.searchsorted(starts, [wanted[0], wanted[-1]], side="right") - 1
            number = int(starts[first])
            rest = iter(wanted)
            row = next(rest, None)
            for batch in file.iter_batches(64, row_groups=list(range(first, last + 1)), columns=[column]):
                while row is not None and row < number + len(batch):
                    content = batch.column(0)[row - number].as_py()
                    yield ImageEmpty.code if content is None else content
                    row = next(rest, None)
                number += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"cannot read the manifest {manifest!r}: {error}") from error
    if row is not None:
        raise JobError(f"the manifest {manifest!r} changed while the job ran: it has no row {row} any more")
