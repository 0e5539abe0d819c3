"""Clients that send pictures and compare every answer with the right vector."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
    notes: Counter[str] = field(default_factory=Counter)
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


def _message(body: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(body)["error"]["message"]
    return ""


Ask = Callable[[int], "Said"]  # sends a client's request number N


class Said(NamedTuple):
    """What one request came to: why it failed, or whether its vectors were right, and by which fingerprint."""

    problem: str | None = None
    right: bool = True
    fingerprint: str | None = None
    note: str = ""  # what the service said of the problem


@contextmanager
def asking(clients: int, client: Callable[[int], AbstractContextManager[Ask]]) -> Iterator[Seen]:
    """`clients` threads, each with its own of client(N), ask without a pause until the block ends."""
    seen, lock, stop = Seen(), threading.Lock(), threading.Event()
    last = time.monotonic()

    def run(number: int) -> None:
        nonlocal last
        with client(number) as ask:
            for count in itertools.count():
                if stop.is_set():
                    break
                began = time.monotonic()
                said = ask(count)
                now = time.monotonic()
                with lock:
                    if said.problem:
                        seen.failures[said.problem] += 1
                        if said.note and seen.notes[said.note] < 1:
                            print(f"{time.strftime('%T')} {said.problem}: {said.note}", flush=True)
                        seen.notes[said.note] += 1
                        continue
                    seen.answered += 1
                    seen.wrong += not said.right
                    seen.fingerprints[said.fingerprint or "none"] += 1
                    seen.seconds.append(now - began)
                    seen.gap_s, last = max(seen.gap_s, now - last), now

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        seen.gap_s = max(seen.gap_s, time.monotonic() - last)


def traffic(port: int, pictures: Sequence[Picture], clients: int = 16) -> AbstractContextManager[Seen]:
    """Clients that send the pictures round and round, each on a kept connection."""

    @contextmanager
    def client(first: int) -> Iterator[Ask]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

        def ask(count: int) -> Said:
            picture = pictures[(first + count * clients) % len(pictures)]
            try:
                answer = post(port, picture.body, picture.content_type, connection)
                if answer.status != 200:
                    return Said(f"status {answer.status}", note=_message(answer.body))
                return Said(None, picture.is_answer(answer.body, answer.fingerprint), answer.fingerprint)
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                time.sleep(PAUSE_S)
                return Said(type(error).__name__)

        yield ask
        connection.close()

    return asking(clients, client)
