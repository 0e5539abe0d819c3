"""Clients that send pictures and compare every answer with the right vector."""

from __future__ import annotations

import http.client
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

HEADERS = {"Accept": "application/x-npy", "Content-Type": "application/octet-stream"}
TOLERANCE = 1e-5
TIMEOUT_S = 90


@dataclass(frozen=True)
class Picture:
    """An image file's content and its vector (d,); None where none is to be compared."""

    body: bytes
    vector: np.ndarray | None = None


@dataclass
class Seen:
    """What all clients saw. `gap_s` is the longest time in which no request was answered with 200."""

    answered: int = 0
    wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    gap_s: float = 0.0

    @property
    def failed(self) -> int:
        return self.wrong + sum(self.failures.values())

    def __str__(self) -> str:
        p99 = np.percentile(self.seconds, 99) if self.seconds else float("nan")
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.failures.most_common())
        return (
            f"{self.answered} answered, {self.wrong} of them wrong, {sum(self.failures.values())} failed"
            f"{f' ({kinds})' if kinds else ''}, p99 {p99:.1f} s, longest gap {self.gap_s:.1f} s"
        )


def post(port: int, body: bytes, connection: http.client.HTTPConnection | None = None) -> tuple[int, bytes]:
    """Send one image; returns status and body of the answer. Raises OSError or HTTPException."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        own.request("POST", "/v1/embeddings/images", body, HEADERS)
        answer = own.getresponse()
        return answer.status, answer.read()
    finally:
        if connection is None:
            own.close()


@contextmanager
def traffic(port: int, pictures: Sequence[Picture], clients: int = 16) -> Iterator[Seen]:
    """`clients` threads send the pictures round and round, each on a kept connection, until the block ends."""
    seen, lock, stop = Seen(), threading.Lock(), threading.Event()
    last = time.monotonic()

    def client(first: int) -> None:
        nonlocal last
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        for number in itertools.count(first, clients):
            if stop.is_set():
                break
            picture = pictures[number % len(pictures)]
            began = time.monotonic()
            problem, right = None, True
            try:
                status, body = post(port, picture.body, connection)
                problem = None if status == 200 else f"status {status}"
                if status == 200 and picture.vector is not None:
                    right = bool(np.abs(np.load(io.BytesIO(body))[0] - picture.vector).max() <= TOLERANCE)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = type(error).__name__
                connection.close()
            now = time.monotonic()
            with lock:
                if problem:
                    seen.failures[problem] += 1
                    continue
                seen.answered += 1
                seen.wrong += not right
                seen.seconds.append(now - began)
                seen.gap_s = max(seen.gap_s, now - last)
                last = now
        connection.close()

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        seen.gap_s = max(seen.gap_s, time.monotonic() - last)
