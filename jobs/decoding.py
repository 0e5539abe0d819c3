"""The decode tasks: a numbered file of inputs in, pixels out, one row for each output file to come.

A row carries all images of one output file. Ray Data may cut and join its blocks between rows only, so an
output file's images stay together whatever their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfleet.checkpoint import PixelSpec
from clipfleet.decode_process import DecodeProcess, Reply, Section, Uri
from clipfleet.errors import ClipfleetError, ImageEmpty, ImageNotFound, JobError
from clipfleet.image_files import ImageLimits
from clipfleet.turns import TURN_S
from jobs.items import BytesManifest
from jobs.manifests import opened_as_planned
from jobs.places import UNKNOWN, FileState, is_uri, look
from jobs.tasks import read_task

_MANIFEST_ROWS = 16  # read at once, of up to 20 MiB each

Outcome = tuple[int, int] | str  # (width, height) or an error's code
Content = Path | Uri | Section | bytes | str  # where an image is, its bytes, or the code of an error


@dataclass(frozen=True)
class DecodePlan:
    """What a decode task has to know. Where the file `stop` is, the job is to end soon."""

    tasks: Path
    stop: Path
    spec: PixelSpec
    limits: ImageLimits
    rows_per_file: int
    manifest: BytesManifest | None


@lru_cache(maxsize=1)
def _process(spec: PixelSpec, limits: ImageLimits) -> DecodeProcess:
    return DecodeProcess(spec, limits, turn_s=TURN_S)  # lives as long as Ray's worker, over many tasks


def decode_tasks(batch: dict[str, np.ndarray], plan: DecodePlan) -> Iterator[pa.Table]:
    """Decode the tasks numbered `batch["item"]`. Yields rows (rows: Arrow file, pixels: uint8 of the good ones).

    When the job is to stop, what is decoded of an output file is yielded as a smaller one, and nothing after it.
    """
    for number in batch["item"]:
        if plan.stop.exists():
            return
        table = read_task(plan.tasks, int(number))
        contents = _contents(table, plan)
        for start in range(0, table.num_rows, plan.rows_per_file):
            wanted = table.slice(start, plan.rows_per_file)
            rows, pixels = _decode(wanted, contents, plan)
            if rows.num_rows:
                yield _row(rows, pixels)
            if rows.num_rows < wanted.num_rows:
                return


def _decode(table: pa.Table, contents: Iterator[Content], plan: DecodePlan) -> tuple[pa.Table, np.ndarray]:
    """The rows (id, uri, width, height, error, size, modified), and the good ones' pixels (k, H, W, 3)."""
    process = _process(plan.spec, plan.limits)
    pixels = np.empty((table.num_rows, *plan.spec.size, 3), np.uint8)  # (n, H, W, 3)
    outcomes: list[Outcome] = []
    states: list[FileState] = []
    good = 0
    listed = map(FileState, table.column("size").to_pylist(), table.column("modified").to_pylist())
    for state, content in zip(listed, contents, strict=False):  # in this order: `contents` goes on with the next file
        if plan.stop.exists():
            break
        if isinstance(content, Path) and state == UNKNOWN:
            state = look(os.fspath(content)) or UNKNOWN  # before it is read: a later change is found by the next look
        outcome = content if isinstance(content, str) else _outcome(process.decode_into(content, pixels[good]))
        if isinstance(content, Uri) and content.look:
            state = FileState(*process.state)
        good += not isinstance(outcome, str)
        outcomes.append(outcome)
        states.append(state)
    sizes = [(None, None, outcome) if isinstance(outcome, str) else (*outcome, None) for outcome in outcomes]
    rows = table.select(["id", "uri"]).slice(0, len(outcomes))
    columns = {
        "width": pa.array([size[0] for size in sizes], pa.int32()),
        "height": pa.array([size[1] for size in sizes], pa.int32()),
        "error": pa.array([size[2] for size in sizes], pa.string()),
        "size": pa.array([state.size for state in states], pa.int64()),
        "modified": pa.array([state.modified for state in states], pa.int64()).cast(pa.timestamp("us", tz="UTC")),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows, pixels[:good]


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
    """The inverse: one row's table of _decode and the good ones' pixels (k, H, W, 3) uint8."""
    rows = pa.ipc.open_stream(batch.column("rows")[row].as_buffer()).read_all()
    pixels = np.frombuffer(batch.column("pixels")[row].as_buffer(), np.uint8)
    return rows, pixels.reshape(-1, *size, 3)


def _contents(table: pa.Table, plan: DecodePlan) -> Iterator[Content]:
    if plan.manifest is None:
        return map(_locate, table.to_pylist())
    return _from_manifest(plan.manifest, table.column("row").to_pylist())


def _locate(row: dict[str, Any]) -> Content:
    if row["error"] is not None:
        return row["error"]
    if row["place"] is None:
        return ImageNotFound.code
    path = row["place"].decode("utf-8", "surrogateescape")
    if row["offset"] is not None:
        return Section(path, row["offset"], row["length"], (row["whole"], row["modified"]))
    return Uri(path, look=row["size"] is None) if is_uri(path) else Path(path)


def _from_manifest(manifest: BytesManifest, wanted: list[int]) -> Iterator[Content]:
    """The bytes in rows `wanted` (ascending) of a Parquet file, read once from the first row group that has one."""
    try:
        with opened_as_planned(manifest) as (file, check):
            starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            first, last = np.searchsorted(starts, [wanted[0], wanted[-1]], side="right") - 1
            number = int(starts[first])
            rest = iter(wanted)
            row = next(rest, None)
            groups = list(range(first, last + 1))
            for batch in file.iter_batches(_MANIFEST_ROWS, row_groups=groups, columns=[manifest.column]):
                check()
                while row is not None and row < number + len(batch):
                    content = batch.column(0)[row - number].as_py()
                    yield ImageEmpty.code if content is None else content
                    row = next(rest, None)
                number += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"cannot read the manifest {manifest.path!r}: {error}") from error
