"""What there is to embed: the images of a folder or a glob, listed in a fixed order without holding them all.

Names are sorted folder by folder. Hidden files and folders (a leading dot) are left out, symbolic links to files
are followed, those to folders are not. A folder gives the files with a suffix of an accepted format, in either
case; other files in it are no images and are ignored. A glob gives every file that it matches.
"""

from __future__ import annotations

import heapq
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from clipfleet.errors import JobError, SettingsError
from clipfleet.images import SUFFIXES

WILDCARDS = "*?["
_RUN = 500_000  # names of one folder that are sorted in memory at a time

Entry = tuple[str, bool]  # name, whether it is a folder
ListFolder = Callable[[str], Iterable[Entry]]


class Item(NamedTuple):
    """One input. `place` is an encoded local path or URI, or the row of a manifest that holds bytes, or None if null."""

    id: str
    uri: str | None
    place: bytes | int | None


@dataclass(frozen=True)
class Source:
    """The inputs, and where their bytes are if a manifest holds them."""

    items: Iterable[Item]
    manifest: str | None = None
    bytes_column: str | None = None


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are none come out as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_uri(path: str) -> bool:
    return "://" in path


def open_files(source: str) -> Source:
    """List a folder or a glob. Raises SettingsError if there is no such folder."""
    if source.startswith("file://"):
        source = unquote(urlsplit(source).path)
    base, patterns = _split(source)
    if not is_uri(base):
        base = os.path.abspath(os.path.expanduser(base))
        if not os.path.isdir(base):
            raise SettingsError(f"there is no folder {base!r}")
        return Source(_items(base, patterns, base, _list_local))
    filesystem, folder = open_filesystem(base)
    if filesystem.get_file_info(folder).type != fs.FileType.Directory:
        raise SettingsError(f"there is no folder {base!r}")

    def list_remote(path: str) -> Iterator[Entry]:
        for info in filesystem.get_file_info(fs.FileSelector(path)):
            yield info.base_name, info.type == fs.FileType.Directory

    return Source(_items(folder, patterns, base, list_remote))


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it. Raises SettingsError for schemes that pyarrow does not know."""
    try:
        return fs.FileSystem.from_uri(uri)
    except Exception as error:  # each file system has errors of its own
        raise SettingsError(f"cannot open {uri!r}: {error}") from error


def _split(source: str) -> tuple[str, list[str]]:
    """Cut a glob before its first wildcard: ("/data", ["a*", "*.png"]); a folder has no patterns."""
    if os.path.isdir(os.path.expanduser(source)) or not any(sign in source for sign in WILDCARDS):
        return source, []
    parts = source.split("/")
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in WILDCARDS))
    base = "/".join(parts[:first]) or ("/" if source.startswith("/") else ".")
    return base, [part for part in parts[first:] if part]


def _items(folder: str, patterns: list[str], base: str, list_folder: ListFolder) -> Iterator[Item]:
    hidden = any(part.startswith(".") for part in patterns)
    depth = None if not patterns or "**" in patterns else len(patterns)
    for name in _walk(list_folder, folder, "", hidden, depth):
        wanted = matches(name.split("/"), patterns) if patterns else name.lower().endswith(SUFFIXES)
        if wanted:
            path = f"{base.rstrip('/')}/{name}"
            place = f"{base.rstrip('/')}/{quote(name)}" if is_uri(base) else path
            yield Item(printable(name), printable(path), os.fsencode(place))


def _walk(list_folder: ListFolder, folder: str, prefix: str, hidden: bool, depth: int | None) -> Iterator[str]:
    """Paths of files below `folder`, relative to the first one, at most `depth` levels down."""
    try:
        for name, is_folder in in_order(list_folder(folder)):
            if name.startswith(".") and not hidden:
                continue
            if not is_folder:
                yield prefix + name
            elif depth != 1:
                deeper = None if depth is None else depth - 1
                yield from _walk(list_folder, f"{folder.rstrip('/')}/{name}", f"{prefix}{name}/", hidden, deeper)
    except FileNotFoundError:
        return  # the folder vanished since its parent was listed
    except OSError as error:
        raise JobError(f"cannot list the folder {printable(folder)!r}: {error.strerror or error}") from error


def _list_local(folder: str) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name, entry.is_dir(follow_symlinks=False)


def matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a path matches a glob, both cut at `/`. `**` stands for any number of folders; dots match dots alone."""
    if not patterns:
        return not parts
    pattern, rest = patterns[0], patterns[1:]
    if pattern == "**":
        return matches(parts, rest) or (bool(parts) and not parts[0].startswith(".") and matches(parts[1:], patterns))
    if not parts or parts[0].startswith(".") != pattern.startswith("."):
        return False
    return fnmatchcase(parts[0], pattern) and matches(parts[1:], rest)


def in_order(entries: Iterable[Entry], run: int = _RUN) -> Iterator[Entry]:
    """Sort entries, in sorted runs on disk where there are more than `run` of them."""
    rest = iter(entries)
    first = sorted(islice(rest, run))
    if len(first) < run:
        yield from first
        return
    with tempfile.TemporaryDirectory(prefix="cf-names-") as folder:
        files: list[IO[bytes]] = []
        while first:
            files.append(_spill(first, Path(folder) / str(len(files))))
            first = sorted(islice(rest, run))
        try:
            yield from heapq.merge(*map(_unspill, files))
        finally:
            for file in files:
                file.close()


def _spill(entries: list[Entry], path: Path) -> IO[bytes]:
    with path.open("wb") as file:
        for entry in entries:
            pickle.dump(entry, file)
    return path.open("rb")


def _unspill(file: IO[bytes]) -> Iterator[Entry]:
    while file.peek(1):  # type: ignore[attr-defined]  # a BufferedReader
        yield pickle.load(file)
