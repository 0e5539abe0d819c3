"""A web server on this machine that serves an image, and does to its clients what servers on the internet may do."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import TypeVar
from urllib.parse import unquote

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(1000)
LARGE = 10_001  # bytes of /large


class Listener(ThreadingHTTPServer):
    """Counts who comes, and does as the path says."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Answer)
        self.connections = 0
        self.hung_up = False
        self.image = IMAGE
        self.port = self.server_address[1]

    def verify_request(self, request: object, client_address: object) -> bool:
        self.connections += 1
        return True


class Answer(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        kind = {"Content_Type": "image/png"}
        path = self.path.partition("?")[0]
        if path == "/image":
            self.reply(self.server.image, **kind)
        elif path == "/hangs-up-once" and not self.server.hung_up:
            self.server.hung_up = True
        elif path == "/hangs-up-once":
            self.reply(self.server.image, **kind)
        elif path == "/hangs-up":
            pass
        elif path.startswith("/hop"):
            left = int(path.removeprefix("/hop"))
            self.reply(b"", 302, Location=f"/hop{left - 1}" if left > 1 else "/image")
        elif path == "/to":
            self.reply(b"", 302, Location=unquote(self.path.partition("?")[2]))
        elif path == "/large":
            self.reply(bytes(LARGE), **kind)
        elif path == "/lying":
            self.reply(bytes(10), length=10**12, **kind)
        elif path == "/html":
            self.reply(b"<html>", Content_Type="text/html")
        elif path == "/bomb":
            self.reply(zlib.compress(bytes(10**6)), Content_Encoding="deflate", **kind)
        elif path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")
            except OSError:
                pass
        else:
            self.reply(b"", 404)
        self.close_connection = True


Server = TypeVar("Server", bound=BaseServer)


@contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """Serve from a thread of its own until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def listening(address: str = "127.0.0.1", port: int = 0) -> AbstractContextManager[Listener]:
    return in_thread(Listener(address, port))
