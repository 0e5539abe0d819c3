"""`clipfleet bench`: load on a service made of the user's images, of drawn ones, or of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from clipfleet.errors import SettingsError
from clipfleet.load import Load, Request, image_request, json_request, run_load
from clipfleet.samples import jpegs
from clipfleet.samples import texts as sample_texts

_DRAWN, _EDGE = 16, 512


def bench(
    url: str,
    *,
    images: Sequence[Path],
    texts: bool,
    clients: int,
    requests: int,
    items: int,
    api_key: str | None,
) -> Load:
    """Send `requests` requests of `items` items from `clients` clients, after a few that do not count.

    Raises Unavailable or SettingsError.
    """
    made = _texts(requests, items) if texts else _images(images, requests, items)
    first = min(requests, 2 * clients)
    run_load(url, _texts(first, items) if texts else made[:first], clients, api_key=api_key)
    with tqdm(total=requests, desc="Loading", unit="request") as bar:
        return run_load(url, made, clients, api_key=api_key, advance=bar.update)


def _texts(requests: int, items: int) -> list[Request]:
    words = iter(sample_texts(requests * items, random.randrange(2**32)))
    # Numbered, so that no cache has one of them.
    start = random.randrange(10**9)
    return [
        json_request(texts=[f"{next(words)} {start + number * items + place}" for place in range(items)])
        for number in range(requests)
    ]


def _images(files: Sequence[Path], requests: int, items: int) -> list[Request]:
    contents = [_read(file) for file in files] or jpegs(_DRAWN, _EDGE, 11)
    made = [
        image_request([contents[(number * items + place) % len(contents)] for place in range(items)])
        for number in range(min(requests, len(contents)))
    ]
    return [made[number % len(made)] for number in range(requests)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
