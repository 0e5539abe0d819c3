"""Clients that send pictures and compare every answer with the right vector."""

from __future__ import annotations

import http.client
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

OCTETS = "application/octet-stream"
TOLERANCE = 1e-5
TIMEOUT_S = 90
PAUSE_S = 0.05  # of a client whose connection failed


@dataclass(frozen=True)
class Picture:
    """A request's body, of one image or of several, and their vectors (n, d) by the fingerprint that makes them."""

    body: bytes
    vectors: Mapping[str, np.ndarray]
    content_type: str = OCTETS

    def is_answer(self, body: bytes, fingerprint: str | None) -> bool:
        """Whether `body` holds the vectors of that fingerprint, and of no other."""
        expected = self.vectors.get(fingerprint or "")
        found = np.load(io.BytesIO(body))
        return expected is not None and found.shape == expected.shape and np.abs(found - expected).max() <= TOLERANCE


class Answer(NamedTuple):
    status: int
    body: bytes
    fingerprint: str | None


@dataclass
class Seen:
    """What all clients saw. `gap_s` is the longest time in which no request was answered with 200."""

    answered: int = 0
    wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    fingerprints: Counter[str] = field(default_factory=Counter)
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


def post(
    port: int, body: bytes, content_type: str = OCTETS, connection: http.client.HTTPConnection | None = None
) -> Answer:
    """Send images. Raises OSError or HTTPException."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        headers = {"Accept": "application/x-npy", "Content-Type": content_type}
        own.request("POST", "/v1/embeddings/images", body, headers)
        answer = own.getresponse()
        return Answer(answer.status, answer.read(), answer.headers.get("X-Clipfleet-Fingerprint"))
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
            problem, right, fingerprint = None, True, None
            try:
                answer = post(port, picture.body, picture.content_type, connection)
                if answer.status == 200:
                    right = picture.is_answer(answer.body, answer.fingerprint)
                    fingerprint = answer.fingerprint
                else:
                    problem = f"status {answer.status}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = type(error).__name__
                connection.close()
                time.sleep(PAUSE_S)
            now = time.monotonic()
            with lock:
                if problem:
                    seen.failures[problem] += 1
                    continue
                seen.answered += 1
                seen.wrong += not right
                seen.fingerprints[fingerprint or "none"] += 1
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
