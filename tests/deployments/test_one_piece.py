"""An answer's head does not leave before its body, whatever lies between the two."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import uvicorn
import uvicorn.protocols.http.h11_impl
import uvicorn.protocols.http.httptools_impl

from deployments.one_piece import hold_heads
from tests.deployments.processes import until


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/early":
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})
        return
    if scope["path"] == "/bug":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("between head and body")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"more"})


@pytest.fixture(params=["h11", "httptools"])
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for module in (uvicorn.protocols.http.h11_impl, uvicorn.protocols.http.httptools_impl):
        monkeypatch.setattr(
            module.RequestResponseCycle, "send", module.RequestResponseCycle.send
        )  # put back afterwards
    hold_heads()
    hold_heads()  # changes nothing
    kind: Literal["h11", "httptools"] = request.param
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=kind, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started, 30, "a server")
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def pieces(port: int, path: str, requests: int = 1) -> list[bytes]:
    """What arrives, as it arrives."""
    found = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for number in range(requests):
            last = b"Connection: close\r\n" if number == requests - 1 else b""
            connection.sendall(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: here\r\n" + last + b"\r\n")
            if not last:
                while b"".join(found).count(b"more") <= number:
                    found.append(connection.recv(2**16))
                    time.sleep(0.01)
        while piece := connection.recv(2**16):
            found.append(piece)
    return found


def test_the_head_comes_with_the_first_of_the_body(port: int) -> None:
    first, *rest = pieces(port, "/")
    assert first.startswith(b"HTTP/1.1 200") and first.endswith(b"half") and b"".join(rest) == b"more"


def test_on_a_kept_connection_too(port: int) -> None:
    found = b"".join(pieces(port, "/", requests=3))
    assert found.count(b"HTTP/1.1 200") == found.count(b"halfmore") == 3


def test_an_application_that_fails_in_between_is_a_500_and_no_half_answer(port: int) -> None:
    assert b"".join(pieces(port, "/bug")).startswith(b"HTTP/1.1 500")


def answered_early(port: int, length: int) -> socket.socket:
    """A connection with an answer to a request of which one byte has come."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(b"POST /early HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\nx" % length)
    assert connection.recv(2**16).endswith(b"no")
    return connection


def test_a_connection_whose_request_is_answered_and_goes_on_for_ever_ends(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.one_piece.LINGER_S", 0.5)
    with answered_early(port, 1_000_000) as connection:

        def is_ended() -> bool:
            try:
                connection.sendall(b"x")
            except OSError:
                return True
            return False

        until(is_ended, 20, "an end")


def test_a_client_that_leaves_before_that_is_no_error(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deployments.one_piece.LINGER_S", 0.2)
    answered_early(port, 1_000_000).close()
    time.sleep(1)
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_a_request_that_ends_after_its_answer_may_be_followed_by_another(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.one_piece.LINGER_S", 0.3)
    with answered_early(port, 4) as connection:
        connection.sendall(b"xxxGET / HTTP/1.1\r\nHost: here\r\n\r\n")  # takes 0.4 s
        found = b""
        while not found.endswith(b"more"):
            piece = connection.recv(2**16)
            assert piece, found
            found += piece
        assert found.startswith(b"HTTP/1.1 200")
