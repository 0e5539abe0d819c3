"""Where a file lies, a local path or the URI of a file system that pyarrow opens, and what is known of it there."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from clipfleet.errors import SettingsError


class FileState(NamedTuple):
    """A file's size in bytes and its last change in microseconds since 1970; None where nobody tells."""

    size: int | None = None
    modified: int | None = None


UNKNOWN = FileState()


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are none come out as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_uri(path: str) -> bool:
    return "://" in path


def local_path(place: str) -> str:
    """A `file://` URI as a path of this machine; anything else as it is."""
    return unquote(urlsplit(place).path) if place.startswith("file://") else place


def split_query(uri: str) -> tuple[str, str]:
    """Cut what stands behind the path of a URI: ("s3://bucket/a", "?region=x"). It belongs behind each path below too."""
    stem, mark, query = uri.partition("?")
    return stem, mark + query


def without_secrets(uri: str) -> str:
    """A URI without the name and password that may stand before its host."""
    return re.sub(r"^([A-Za-z][\w+.-]*://)[^/@]*@", r"\1", uri)


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it. Raises SettingsError for schemes that pyarrow does not know."""
    try:
        return fs.FileSystem.from_uri(uri)
    except Exception as error:  # each file system has errors of its own
        raise SettingsError(f"cannot open {without_secrets(uri)!r}: {error}") from error


def state_of(info: fs.FileInfo) -> FileState:
    """What a listing tells of a file. pyarrow has 0 for a time that it cannot read, as one with 33.04 seconds."""
    return FileState(info.size, info.mtime_ns // 1000 if info.mtime_ns else None)


def look(path: str) -> FileState | None:
    """The state of the file at a local path or URI now; None if there is none, UNKNOWN if nobody tells."""
    try:
        if not is_uri(path):
            status = os.stat(path)
            return FileState(status.st_size, status.st_mtime_ns // 1000)
        filesystem, inside = known_filesystem(path)
        info = filesystem.get_file_info(inside)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # each file system has errors of its own; reading the file will name it
        return UNKNOWN
    return None if info.type == fs.FileType.NotFound else state_of(info)


def known_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """open_filesystem(), with a connection for each host and bucket kept: opening one takes longer than a request."""
    stem, query = split_query(uri)
    scheme, _, rest = stem.partition("://")
    host, slash, path = rest.partition("/")
    if scheme not in ("s3", "gs", "gcs"):
        return fs.FileSystem.from_uri(uri)
    filesystem, bucket = _filesystem(f"{scheme}://{host}{query}")
    return filesystem, f"{bucket}{slash}{unquote(path)}"


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(root)
