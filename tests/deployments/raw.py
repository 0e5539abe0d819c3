"""Requests byte by byte, also such as no client sends, and what comes back."""

from __future__ import annotations

import http.client
import io
import json
import select
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

SECONDS = 20  # a guard against a hang


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The body's error, whose shape is checked."""
        assert self.headers["content-type"] == "application/json", self.body[:300]
        body = json.loads(self.body)
        assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "code", "param"}
        return body["error"]


def request(
    body: bytes = b"",
    *headers: str | bytes,
    method: str = "POST",
    path: str = "/v1/embeddings",
    version: str = "HTTP/1.1",
    length: bool = True,
    last: bool = True,
) -> bytes:
    """One request; `length` says whether it has a Content-Length of its own, `last` whether the connection ends with it."""
    lines = [f"{method} {path} {version}".encode(), b"Host: here"]
    lines += [line.encode() if isinstance(line, str) else line for line in headers]
    lines += [f"Content-Length: {len(body)}".encode()] if length else []
    lines += [b"Connection: close"] if last else []
    return b"\r\n".join([*lines, b"", body])


def chunked(*chunks: bytes) -> bytes:
    """A whole chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def send(port: int, pieces: bytes | Iterable[bytes]) -> tuple[list[Answer], int]:
    """Send pieces until there are no more or an answer comes; gives all answers, and how many bytes were sent."""
    sent, received = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        with suppress(OSError):  # it may have answered and hung up
            for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                connection.sendall(piece)
                sent += len(piece)
                if not isinstance(pieces, bytes) and select.select([connection], [], [], 0)[0]:
                    connection.shutdown(socket.SHUT_WR)  # or HAProxy would wait for the rest
                    break
        with suppress(ConnectionError):
            while data := connection.recv(2**16):
                received += data
    return _parse(received), sent


class _Kept(io.BytesIO):
    """Stands for a socket, and stays open: an answer closes its file, although others follow."""

    def makefile(self, mode: str) -> _Kept:
        return self

    def close(self) -> None:
        pass


def _parse(received: bytes) -> list[Answer]:
    file, answers = _Kept(received), []
    while file.tell() < len(received):
        answer = http.client.HTTPResponse(cast(socket.socket, file))
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        answers.append(Answer(answer.status, headers, answer.read()))
    return answers
