"""The extras of this package, and which of their packages are installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_NAMES = ("local", "serve", "openvino", "qdrant", "tracing")


@dataclass(frozen=True)
class Extra:
    """The packages that an extra needs: their versions, or None."""

    name: str
    packages: dict[str, str | None]

    @property
    def missing(self) -> list[str]:
        return [name for name, version in self.packages.items() if version is None]


def extras() -> Iterator[Extra]:
    """Those that a person may want, not those of the tests."""
    needed: dict[str, list[str]] = {extra: [] for extra in _NAMES}
    for line in importlib.metadata.requires("clipfleet") or []:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        here = "sys_platform" not in line or sys.platform in line
        if name and extra and extra[1] in needed and name[0] != "clipfleet" and here:
            needed[extra[1]].append(name[0])
    for extra, names in needed.items():
        if not names:  # an older install has not heard of it
            continue
        yield Extra(extra, {name: _version(name) for name in names})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
