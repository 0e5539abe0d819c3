"""What there is to embed: the images of a folder or a glob, listed in a fixed order without holding them all.

Names are sorted folder by folder. Hidden files and folders (a leading dot) are left out, symbolic links to
files are followed, those to folders are not, and a warning says so. A folder gives the files with a suffix of
an accepted format, in either case; other files in it are no images and are ignored. A glob gives every file
that it matches. Where tar shards are found instead, their members are what there is to embed (tars.py).
"""

from __future__ import annotations

import heapq
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote, unquote

from loguru import logger
from pyarrow import fs

from clipfleet.errors import JobError, SettingsError
from clipfleet.image_files import SUFFIXES
from jobs.items import Item, Source
from jobs.places import (
    UNKNOWN,
    FileState,
    is_uri,
    local_path,
    open_filesystem,
    printable,
    split_query,
    state_of,
    without_secrets,
)
from jobs.tars import shard_items

WILDCARDS = "*?["
TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_RUN = 500_000  # names of one folder that are sorted in memory at a time

# Name, whether it is a folder (None: a link to one), what the listing tells of the file.
Entry = tuple[str, bool | None, FileState]
ListFolder = Callable[[str], Iterable[Entry]]


@dataclass
class Unfollowed:
    """The links to folders that a listing has met."""

    count: int = 0
    first: str = ""

    def note(self, path: str) -> None:
        self.count, self.first = self.count + 1, self.first or path

    def warn(self) -> None:
        if self.count:
            logger.warning(
                "links to folders are not followed; there are {}, the first is {!r}. Name what they lead to as a SOURCE of "
                "its own, or move it here",
                self.count,
                printable(self.first),
            )


class Base(NamedTuple):
    """The folder of a listing: how people write it, how its file system does, and what a URI has behind the path."""

    written: str
    inside: str
    query: str

    def item(self, name: str, state: FileState) -> Item:
        """The file `name`, relative to this folder."""
        path = f"{self.written.rstrip('/')}/{name}"
        if not is_uri(path):
            return Item(printable(name), printable(path), os.fsencode(path), state=state)
        place = f"{self.written.rstrip('/')}/{quote(name)}{self.query}"
        return Item(printable(name), printable(without_secrets(path + self.query)), place.encode(), state=state)


def open_files(source: str) -> Source:
    """List a folder, a glob or a tar. Raises SettingsError if there is no such thing."""
    source = local_path(source)
    if split_query(source)[0].lower().endswith(COMPRESSED):
        raise SettingsError(
            f"{without_secrets(source)!r} is compressed, and members of such a tar cannot be read in place; decompress it"
        )
    base, files = _open_base(source)
    rest = iter(files)
    ahead = list(islice(rest, 1))
    everything = chain(ahead, rest)
    # One kind or the other, as the first file has it: a mixture would be a mistake more often than not.
    if ahead and _is_tar(ahead[0]):
        return Source(_members(everything), shards=True)
    return Source(_images(everything, base.written))


def _open_base(source: str) -> tuple[Base, Iterable[Item]]:
    """The folder that `source` names, and its files; a tar is the only one of its folder."""
    stem, patterns = _split(source)
    if is_uri(source):
        query = split_query(source)[1]
        filesystem, inside = open_filesystem(stem + query)
        info = _info(filesystem, inside, stem)
        kind, state, list_folder = info.type, state_of(info), partial(_list_remote, filesystem)
    else:
        stem = inside = os.path.abspath(os.path.expanduser(stem))
        query, state, list_folder = "", UNKNOWN, _list_local
        kind = fs.FileType.Directory if os.path.isdir(stem) else fs.FileType.File if os.path.isfile(stem) else None
    if kind == fs.FileType.File and stem.lower().endswith(TAR):
        folder, _, name = stem.rpartition("/")
        base = Base(folder or "/", inside.rpartition("/")[0], query)
        return base, [base.item(unquote(name) if is_uri(stem) else name, state)]
    if kind != fs.FileType.Directory:
        raise SettingsError(f"there is no folder {without_secrets(stem)!r}")
    base = Base(stem, inside, query)
    return base, _files(base, patterns, list_folder)


def _info(filesystem: fs.FileSystem, inside: str, stem: str) -> fs.FileInfo:
    try:
        return filesystem.get_file_info(inside)
    except OSError as error:  # nobody answers, or access is denied
        raise SettingsError(f"cannot open {without_secrets(stem)!r}: {error}") from error


def _list_remote(filesystem: fs.FileSystem, path: str) -> Iterator[Entry]:
    for info in filesystem.get_file_info(fs.FileSelector(path)):
        yield info.base_name, info.type == fs.FileType.Directory, state_of(info)


def _is_tar(item: Item) -> bool:
    return item.id.lower().endswith(TAR)


def _members(files: Iterable[Item]) -> Iterator[Item]:
    for file in files:
        if not _is_tar(file):
            raise JobError(f"the source holds tars, and {file.uri!r} is none; give a glob such as 'FOLDER/*{TAR}'")
        yield from shard_items(file)


def _images(files: Iterable[Item], folder: str) -> Iterator[Item]:
    for file in files:
        if _is_tar(file):
            raise JobError(
                f"{without_secrets(folder)!r} holds images and the tar {file.id!r}; give a glob that matches one kind"
            )
        yield file


def _split(source: str) -> tuple[str, list[str]]:
    """Cut a glob before its first wildcard: ("/data", ["a*", "*.png"]); a folder has no patterns. In a URI, `?` is none:
    its query starts there, which is left out."""
    wildcards = WILDCARDS
    if is_uri(source):
        source, wildcards = split_query(source)[0], WILDCARDS.replace("?", "")
    elif os.path.lexists(os.path.expanduser(source)):
        return source, []
    if not any(sign in source for sign in wildcards):
        return source, []
    parts = source.split("/")
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in wildcards))
    base = "/".join(parts[:first]) or ("/" if source.startswith("/") else ".")
    return base, [part for part in parts[first:] if part]


def _files(base: Base, patterns: list[str], list_folder: ListFolder) -> Iterator[Item]:
    hidden = any(part.startswith(".") for part in patterns)
    depth = None if not patterns or "**" in patterns else len(patterns)
    links = Unfollowed()
    for name, state in _walk(list_folder, base.inside, "", hidden, depth, links):
        wanted = matches(name.split("/"), patterns) if patterns else name.lower().endswith((*SUFFIXES, TAR))
        if wanted:
            yield base.item(name, state)
    if not is_uri(base.written) and not os.path.isdir(base.inside):  # its files are not gone one by one
        raise JobError(f"the folder {printable(base.written)!r} has vanished while it was listed")
    links.warn()


def _walk(
    list_folder: ListFolder, folder: str, prefix: str, hidden: bool, depth: int | None, links: Unfollowed
) -> Iterator[tuple[str, FileState]]:
    """Files below `folder` by their paths relative to the first one, at most `depth` levels down."""
    try:
        for name, is_folder, state in in_order(list_folder(folder)):
            if name.startswith(".") and not hidden:
                continue
            path = f"{folder.rstrip('/')}/{name}"
            if is_folder is False:
                yield prefix + name, state
            elif depth == 1:
                continue
            elif is_folder is None:
                links.note(path)
            else:
                deeper = None if depth is None else depth - 1
                yield from _walk(list_folder, path, f"{prefix}{name}/", hidden, deeper, links)
    except FileNotFoundError:
        return  # the folder vanished since its parent was listed
    except OSError as error:
        raise JobError(f"cannot list the folder {printable(folder)!r}: {error.strerror or error}") from error


def _list_local(folder: str) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # A look at each file would cost a call each; one at each link does.
            folder_or_link = (
                None if entry.is_symlink() and _leads_to_folder(entry) else entry.is_dir(follow_symlinks=False)
            )
            yield entry.name, folder_or_link, UNKNOWN


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a loop, or no right to look: reading it will tell
        return False


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
