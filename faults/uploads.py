"""Uploads that are too large for HAProxy to send them again, by clipfleet's own client, while ingress replicas die."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from PIL import Image

from clipfleet import Client, ClipfleetError
from clipfleet.encoder import Encoder
from clipfleet.images import decode
from faults.chaos import kill_replicas
from faults.report import Row
from faults.served import config, serve
from faults.traffic import TOLERANCE, Ask, Said, Seen, asking

CLIENTS = 4
SIDE = 1672  # pixels: 8 MiB of an uncompressed picture
EVERY_S = 10.0
PORT = 8480


def pictures() -> list[tuple[bytes, np.ndarray]]:
    """One for each client, with its vector by the library."""
    encoder, rng, found = Encoder("tiny", "cpu"), np.random.default_rng(8), []
    for _ in range(CLIENTS):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "BMP")
        pixels = decode(file.getvalue(), encoder.checkpoint.pixels).pixels
        found.append((file.getvalue(), encoder.encode_pixels(pixels[None])[0]))
    return found


def uploads(port: int, shown: list[tuple[bytes, np.ndarray]]) -> AbstractContextManager[Seen]:
    """A client for each picture sends it again and again."""

    @contextmanager
    def uploader(number: int) -> Iterator[Ask]:
        body, expected = shown[number]
        with Client(f"http://127.0.0.1:{port}") as client:

            def ask(_: int) -> Said:
                try:
                    (vector,) = client.embed_images([body])
                except ClipfleetError as error:
                    return Said(error.code)
                return Said(None, bool(np.abs(vector - expected).max() <= TOLERANCE))

            yield ask

    return asking(len(shown), uploader)


class _Repeated(logging.Handler):
    """Counts what the client tried again."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        print(f"{time.strftime('%T')} {record.getMessage()}", flush=True)


def measure(seconds: float) -> list[Row]:
    """With two ingress replicas, and with the only one."""
    shown, rows = pictures(), []
    repeated, log = _Repeated(), logging.getLogger("clipfleet.connection")
    log.addHandler(repeated)
    log.setLevel(logging.INFO)
    for replicas in (2, 1):
        repeated.count = 0
        with serve(config({"Ingress": replicas}), "tiny", PORT) as served, uploads(served.port, shown) as seen:
            killed = kill_replicas(served, ["Ingress"], EVERY_S, seconds, least=replicas - 1)
            time.sleep(15)
        fault = f"`kill -9` of one of {replicas} Ingress every {EVERY_S:.0f} s, uploads of 8 MiB by `clipfleet.Client`, tiny"
        print(f"{fault}: {killed} times; {seen}", flush=True)
        outcome = f"{seen}; {repeated.count} tried again"
        rows.append(Row(fault, f"{CLIENTS} clients", killed, outcome, killed > 0 and not seen.failed))
    log.removeHandler(repeated)
    return rows
