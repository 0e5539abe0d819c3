"""Near-duplicates in a job's DEST: rows joined by chains of pairs whose cosine reaches a threshold.

    write_table(find(dest, 0.97), out)      a line a row: its group, its cosine to the group's first

Every pair of rows is compared, block by block, so the result is exact; memory holds two blocks, the table of pairs of one and a
number a row. 100,000 rows of 512 numbers are 5 * 10^12 operations.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from clipfleet.errors import ClipfleetError, FingerprintMismatch, JobError, SettingsError
from clipfleet.image_files import open_image, read_file
from jobs.parts import PREFIX, format_of, parts, reading

_BLOCK = 1024  # rows; a table of pairs is 4 MB
_THUMBNAIL = (160, 160)
_ON_A_PAGE, _OF_A_GROUP = 200, 24  # groups, pictures


@dataclass(frozen=True)
class Member:
    """One row of a group: its id, where its image is, and its cosine to the group's first row."""

    id: str
    uri: str | None
    score: float


Group = list[Member]  # the first row is the one that DEST has first


def find(dest: Path, threshold: float) -> list[Group]:
    """The groups of two rows or more, largest first. Rows without a vector are in none. Raises JobError or SettingsError."""
    if not -1 <= threshold <= 1:
        raise SettingsError(f"a cosine is between -1 and 1, and the threshold is {threshold:g}")
    with _vectors(dest) as (ids, uris, vectors):
        roots = _joined(vectors, threshold)
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        groups = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
        groups.sort(key=lambda rows: (-len(rows), rows[0]))
        return [_group(rows, ids, uris, vectors) for rows in groups]


def _group(rows: np.ndarray, ids: Sequence[str], uris: Sequence[str | None], vectors: np.ndarray) -> Group:
    numbers: list[int] = rows.tolist()
    scores = [float(vectors[number] @ vectors[numbers[0]]) for number in numbers]
    return [Member(ids[number], uris[number], min(score, 1.0)) for number, score in zip(numbers, scores, strict=True)]


def _joined(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """The smallest row of each row's group (n,)."""
    count = len(vectors)
    roots = np.arange(count)
    for first in range(0, count, _BLOCK):
        ours = np.ascontiguousarray(vectors[first : first + _BLOCK])  # (b, d)
        for second in range(first, count, _BLOCK):
            theirs = np.ascontiguousarray(vectors[second : second + _BLOCK])
            near, far = np.nonzero(ours @ theirs.T >= threshold)
            if len(near):
                _join(roots, near + first, far + second)
    return _settled(roots)


def _join(roots: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Join the groups of each pair of rows, until every pair has one root."""
    while True:
        roots[:] = _settled(roots)
        low, high = np.minimum(roots[one], roots[other]), np.maximum(roots[one], roots[other])
        apart = low != high
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        np.minimum.at(roots, high[apart], low[apart])


def _settled(roots: np.ndarray) -> np.ndarray:
    """Each row's root in one step."""
    while not np.array_equal(found := roots[roots], roots):
        roots = found
    return roots


@contextmanager
def _vectors(dest: Path) -> Iterator[tuple[list[str], list[str | None], np.ndarray]]:
    """Ids, uris and vectors (n, d) of DEST's good rows, the vectors in a file, not in memory."""
    files = parts(dest)
    if not files:
        inside = dest / "vectors"  # where `clipfleet index` keeps them
        hint = f"; {str(inside)!r} does" if parts(inside) else ""
        raise JobError(f"{str(dest)!r} holds no rows of a job{hint}")
    ids: list[str] = []
    uris: list[str | None] = []
    dimension, made_by = 0, _fingerprint(files[0])
    with tempfile.TemporaryFile() as held:
        for path in files:
            if (other := _fingerprint(path)) != made_by:
                raise FingerprintMismatch(
                    f"{str(dest)!r} holds vectors of two checkpoints, with fingerprints {made_by} and {other}: they cannot be "
                    "compared",
                    found=other,
                    expected=made_by,
                )
            rows, vectors = _good(path)
            ids += rows.column("id").to_pylist()
            uris += rows.column("uri").to_pylist()
            dimension = dimension or (vectors.shape[1] if len(vectors) else 0)
            try:
                held.write(np.ascontiguousarray(vectors, np.float32).tobytes())
                held.flush()
            except OSError as error:
                where = f"{tempfile.gettempdir()!r} (TMPDIR)"
                raise JobError(f"the vectors cannot be written to {where}: {error.strerror or error}") from error
        if not ids:
            raise JobError(f"{str(dest)!r} holds no row with a vector")
        yield ids, uris, np.memmap(held, np.float32, "r", shape=(len(ids), dimension))


def _fingerprint(path: Path) -> str:
    with reading(path) as file:
        return (file.schema_arrow.metadata or {}).get(f"{PREFIX}fingerprint".encode(), b"").decode()


def _good(path: Path) -> tuple[pa.Table, np.ndarray]:
    """A file's rows without error, and their vectors (k, d) in the same order."""
    with reading(path) as file:
        table = file.read()
    table = table.filter(table.column("error").is_null())
    if not table.num_rows:
        return table, np.zeros((0, 0), np.float32)
    if format_of(table.schema) == "parquet":
        column = table.column("embedding").combine_chunks()
        return table, column.flatten().to_numpy().reshape(table.num_rows, -1)
    (name,) = set(table.column("npy").to_pylist())
    try:
        return table, np.load(path.parent / name, mmap_mode="r")[table.column("row").to_numpy()]
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise JobError(f"{str(path.parent / name)!r} cannot be read: {error}") from error


def as_table(groups: Sequence[Group]) -> pa.Table:
    """A row for each member: `group` (0 is the largest), `id`, `uri`, `score` to the group's first."""
    rows = [
        {"group": number, "id": member.id, "uri": member.uri, "score": member.score}
        for number, group in enumerate(groups)
        for member in group
    ]
    fields = [("group", pa.int64()), ("id", pa.string()), ("uri", pa.string()), ("score", pa.float32())]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def check_out(out: Path, suffixes: Sequence[str] = (".parquet", ".csv", ".jsonl")) -> None:
    """Raise SettingsError for a file that could not be written; before the work, not after it."""
    if suffixes and out.suffix not in suffixes:
        raise SettingsError(f"{str(out)!r} ends in none of {', '.join(suffixes)}")
    if not out.absolute().parent.is_dir():
        raise SettingsError(f"cannot write {str(out)!r}: its folder is not there")


def write_table(groups: Sequence[Group], out: Path) -> None:
    """Write the table as .parquet, .csv or .jsonl, by the file's name. Raises SettingsError."""
    import pyarrow.csv

    check_out(out)
    table = as_table(groups)
    try:
        if out.suffix == ".parquet":
            pq.write_table(table, out)
        elif out.suffix == ".csv":
            pyarrow.csv.write_csv(table, out)
        else:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()]
            out.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {str(out)!r}: {error.strerror or error}") from error


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
:root { color-scheme: light dark; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
ul { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; margin: 0; padding: 0; }
li { width: 160px; font-size: .8rem; overflow-wrap: anywhere; } img { display: block; max-width: 160px; }
.none { display: block; width: 160px; padding: 3rem .5rem; background: #8883; }
"""


def write_page(groups: Sequence[Group], out: Path, threshold: float) -> None:
    """Write one HTML file with the groups' thumbnails, read from their uris where those are files here."""
    shown = groups[:_ON_A_PAGE]
    rest = f" The {_ON_A_PAGE} largest are shown." if len(groups) > len(shown) else ""
    title = f"{len(groups)} groups of near-duplicates"
    body = "".join(_section(number, group) for number, group in enumerate(shown))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>Cosine {threshold:g} or more, by chains of pairs.{rest}</p>{body}</body></html>\n"
    )
    try:
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"cannot write {str(out)!r}: {error.strerror or error}") from error


def _section(number: int, group: Group) -> str:
    items = "".join(
        f"<li>{_picture(member)}{escape(member.id)}<br>{member.score:.4f}</li>" for member in group[:_OF_A_GROUP]
    )
    more = f"<p>and {len(group) - _OF_A_GROUP} more</p>" if len(group) > _OF_A_GROUP else ""
    return f"<h2>Group {number}: {len(group)} pictures</h2><ul>{items}</ul>{more}"


def _picture(member: Member) -> str:
    path = (member.uri or "").removeprefix("file://")
    try:
        with open_image(read_file(os.fspath(path))) as image:
            image.draft("RGB", _THUMBNAIL)
            picture = ImageOps.exif_transpose(image).convert("RGB")
        picture.thumbnail(_THUMBNAIL)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
    except (ClipfleetError, OSError, ValueError, Image.DecompressionBombError):
        return '<span class="none">no picture here</span>'
    return f'<img alt="{escape(member.id)}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
