"""API keys by name, in a file that holds their hashes alone.

A line is `NAME SHA-256-IN-HEX`; empty lines and those that start with # are passed over. A key has 256 random bits, so
its plain hash gives nothing away. A service reads the file anew when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipfleet.errors import SettingsError

PREFIX = "cf_"
_HASHED = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_IN_A_HEADER = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


def fits_a_header(key: str) -> bool:
    """Whether a key can be sent: printable ASCII, without spaces at its ends."""
    return _IN_A_HEADER.fullmatch(key) is not None


def authorization(key: str | None) -> dict[str, str]:
    """The header that sends a key; none without one. Raises SettingsError, whose message has nothing of the key."""
    if key is None:
        return {}
    if not fits_a_header(key):
        raise SettingsError("the API key is empty, or holds a line's end or another character that no HTTP header has")
    return {"Authorization": f"Bearer {key}"}


def digest(key: str) -> str:
    """What stands for a key, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def hashed(key: str) -> str:
    """What a service keeps of a fixed key; of what it has kept already, the same."""
    kept = key.startswith(_HASHED) and _HASH.fullmatch(key.removeprefix(_HASHED))
    return key if kept else _HASHED + digest(key)


def read_keys(path: str | os.PathLike[str]) -> dict[str, str]:
    """The hash of each key, by name. Raises SettingsError that names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the file of API keys cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or not _HASH.fullmatch(words[1]):
            raise SettingsError(f"{path}, line {number}: a line is NAME and the SHA-256 of its key in hex")
        if words[0] in found:
            raise SettingsError(f"{path}, line {number}: the name {words[0]!r} is there twice")
        found[words[0]] = words[1]
    return found


def add_key(path: str | os.PathLike[str], name: str) -> str:
    """Make a key under a new name and return it: the only time that anyone sees it. Raises SettingsError."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is no name of a key: letters, digits, dots, dashes and underscores, up to 64")
    key = PREFIX + secrets.token_urlsafe(32)
    with _changing(path) as (kept, lines):
        if name in kept:
            raise SettingsError(f"there is a key {name!r} already; revoke it first")
        lines.append(f"{name} {digest(key)}")
    return key


def revoke_key(path: str | os.PathLike[str], name: str) -> None:
    """Remove a key. Raises SettingsError."""
    with _changing(path) as (kept, lines):
        if name not in kept:
            raise SettingsError(f"there is no key {name!r}; there are {', '.join(sorted(kept)) or 'none'}")
        lines[:] = [line for line in lines if line.split()[:1] != [name]]


@contextmanager
def _changing(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The keys, and the file's lines to change; they are written at the end. One process at a time."""
    import fcntl  # only where services run

    target = Path(os.path.realpath(path))  # a link stays one
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SettingsError(f"the file of API keys cannot be written: {error}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        there = target.exists()
        lines = target.read_text(encoding="utf-8").splitlines() if there else []
        yield read_keys(target) if there else {}, lines
        _write(target, lines)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the file of API keys cannot be written: {error}") from error
    finally:
        os.close(folder)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Replace the file whole, so that a service never reads half of it. It keeps its owner and mode, so that a service that
    runs as somebody else can still read it; a new one is its maker's alone."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            with suppress(FileNotFoundError):
                before = path.stat()
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), before.st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


class KeyRing:
    """The keys that a service accepts: fixed ones, and those of a file, which is read again when it changes."""

    def __init__(self, keys: tuple[str, ...], file: str | None) -> None:
        self._fixed = {f"key {number}": hashed(key).removeprefix(_HASHED) for number, key in enumerate(keys, 1)}
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._from_file: dict[str, str] = {}
        if file is not None:
            self.refresh()

    @property
    def asks(self) -> bool:
        """Whether requests need a key at all. A file without keys lets nobody in."""
        return bool(self._fixed) or self._file is not None

    def refresh(self) -> None:
        """Read the file if it is another than before. Raises SettingsError, and then the keys stay as they were."""
        if self._file is None:
            return
        try:
            status = os.stat(self._file)
        except OSError as error:
            raise SettingsError(f"the file of API keys cannot be read: {error}") from error
        seen = status.st_mtime_ns, status.st_size, status.st_ino
        if seen != self._seen:
            self._from_file = read_keys(self._file)
            self._seen = seen

    def name_of(self, key: str) -> str | None:
        """Who has this key; None if nobody has. Compares with every one, in constant time."""
        wanted = digest(key)
        found = None
        for name, hash_ in (*self._fixed.items(), *self._from_file.items()):
            if hmac.compare_digest(wanted, hash_):
                found = name
        return found
