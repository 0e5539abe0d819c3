"""Load on a running service: requests from many clients at once, and what they took."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from clipfleet.errors import SettingsError, Unavailable
from clipfleet.keys import authorization

_NPY = {"Accept": "application/x-npy"}
_JSON = {"Content-Type": "application/json"}
_BOUNDARY = "clipfleet-load"


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    path: str
    headers: dict[str, str]
    body: bytes
    items: int = 1


@dataclass(frozen=True)
class Load:
    """What a run of requests took. Times are seconds of the requests that were answered 200."""

    requests: int
    items: int  # of the requests that were answered 200
    seconds: float
    p50: float
    p90: float
    p99: float
    failures: dict[str, int]  # by status or kind of error
    first_failure: str = ""  # what the service said

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds

    def as_json(self) -> dict[str, Any]:
        """All of it; null for times of nothing."""
        times = {name: getattr(self, name) if self.items else None for name in ("p50", "p90", "p99")}
        return {**asdict(self), "items_per_second": self.rate, **times}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {getattr(self, name) * 1000:.0f} ms" for name in ("p50", "p90", "p99"))
        failed = "".join(f", {count} answered {what}" for what, count in sorted(self.failures.items()))
        told = f"\nThe first failure: {self.first_failure}" if self.first_failure else ""
        if not self.items:
            return f"none of {self.requests} requests had its vectors in {self.seconds:.1f} s{failed}{told}"
        return f"{self.rate:.1f} items/s over {self.seconds:.1f} s ({self.requests} requests): {times}{failed}{told}"


def image_request(images: Sequence[bytes]) -> Request:
    """One image as the raw body, or several as multipart; the answer is an .npy."""
    path = "/v1/embeddings/images"
    if len(images) == 1:
        return Request(path, {**_NPY, "Content-Type": "application/octet-stream"}, images[0])
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="image"\r\n\r\n'.encode()
    body = b"".join(head + image + b"\r\n" for image in images) + f"--{_BOUNDARY}--\r\n".encode()
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    return Request(path, {**_NPY, "Content-Type": kind}, body, len(images))


def json_request(images: Sequence[bytes] = (), texts: Sequence[str] = ()) -> Request:
    """Images as base64, then texts, in OpenAI's shape; vectors come back as base64."""
    items: list[dict[str, str]] = [{"image": base64.b64encode(image).decode()} for image in images]
    items += [{"text": text} for text in texts]
    body = json.dumps({"input": items, "encoding_format": "base64"}).encode()
    return Request("/v1/embeddings", _JSON, body, len(items))


def run_load(
    url: str,
    requests: Iterable[Request],
    clients: int,
    *,
    api_key: str | None = None,
    timeout_s: float = 120,
    advance: Callable[[int], object] | None = None,
) -> Load:
    """Send the requests from `clients` threads, each on one kept connection; `advance` is called with 1 for each answer.

    Raises Unavailable if nobody listens at `url`, SettingsError if it is no http(s) address or the key none for HTTP.
    """
    scheme, host, port, prefix = _parse(url)
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    more = authorization(api_key)
    pending, lock = iter(requests), threading.Lock()
    seconds: list[float] = []
    failures: Counter[str] = Counter()
    told: list[str] = []
    counts = {"sent": 0, "items": 0}

    def client() -> None:
        connection = kind(host, port, timeout=timeout_s)
        while True:
            with lock:
                request = next(pending, None)
            if request is None:
                break
            started = time.perf_counter()
            try:
                connection.request("POST", prefix + request.path, request.body, {**request.headers, **more})
                answer = connection.getresponse()
                said = answer.read()
                failure = None if answer.status == 200 else str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                failure, said = type(error).__name__, str(error).encode()
                connection.close()
            with lock:
                counts["sent"] += 1
                if failure is None:
                    counts["items"] += request.items
                    seconds.append(time.perf_counter() - started)
                else:
                    failures[failure] += 1
                    if not told:
                        told.append(_message(said))
                if advance is not None:
                    advance(1)
        connection.close()

    _check_there(kind, host, port)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99]).tolist() if seconds else (float("nan"),) * 3
    return Load(counts["sent"], counts["items"], elapsed, p50, p90, p99, dict(failures), told[0] if told else "")


def _message(answer: bytes) -> str:
    """What an answer that is no success says: the message of an error in OpenAI's shape, or the beginning of its text."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(answer)["error"]["message"])
    return answer[:200].decode(errors="replace").strip()


def _parse(url: str) -> tuple[str, str, int, str]:
    with suppress(ValueError):  # of a port that is no number, and the like
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            return parts.scheme, parts.hostname, port, parts.path.rstrip("/")
    raise SettingsError(f"{url!r} is no address of a service; give one such as http://127.0.0.1:8000")


def _check_there(kind: type[http.client.HTTPConnection], host: str, port: int) -> None:
    try:
        connection = kind(host, port, timeout=10)
        connection.connect()
        connection.close()
    except OSError as error:
        raise Unavailable(f"nobody listens at {host}:{port}: {error.strerror or error}") from error
