"""A machine between client and service that has faults: of its connections the first ones meet one each, the rest pass."""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import AbstractContextManager, suppress

from tests.deployments.listener import in_thread

CUT = b""  # hangs up in the middle of the request
SILENT = b"silent"  # says nothing to the request


def answer(status: int, code: str = "unavailable", retry_after: int | None = None) -> bytes:
    """An error as the service words it."""
    body = f'{{"error": {{"message": "{code} at the front", "type": "server_error", "code": "{code}", "param": null}}}}'
    lines = [f"HTTP/1.1 {status} Here", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"Retry-After: {retry_after}"] if retry_after else []
    return "\r\n".join([*lines, "Connection: close", "", body]).encode()


class Front(socketserver.ThreadingTCPServer):
    """Passes bytes on to `port`, but for one connection of each of `faults`; counts the connections."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, faults: list[bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Way)
        self.behind = port
        self.faults = iter(faults)
        self.connections = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Way(socketserver.BaseRequestHandler):
    server: Front

    def handle(self) -> None:
        self.server.connections += 1
        fault = next(self.server.faults, None)
        if fault is None:
            self._pass_on()
            return
        self.request.recv(2**16)
        if fault not in (CUT, SILENT):
            self.request.sendall(fault)
            self.request.shutdown(socket.SHUT_WR)
        if fault != CUT:  # what is not read of a request makes the kernel reset the connection, and its answer is lost
            while self.request.recv(2**16):
                pass

    def _pass_on(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.behind)) as behind:
            back = threading.Thread(target=_copy, args=(behind, self.request))
            back.start()
            _copy(self.request, behind)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def front(port: int, *faults: bytes) -> AbstractContextManager[Front]:
    return in_thread(Front(port, list(faults)))
