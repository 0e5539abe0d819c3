"""Images by address: what is fetched, and what must never be connected to."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import unquote

import pytest

from clipfleet.errors import ClipfleetError, ImageNotFetched, ImageTooManyBytes, ImageUrlForbidden
from clipfleet.settings import UrlSettings
from deployments.fetching import Fetcher, is_public

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(1000)
MOST = 10_000


class Listener(ThreadingHTTPServer):
    """A web server on this machine that counts who comes, and does as the path says."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), Answer)
        self.connections = 0
        self.port = self.server_address[1]

    def verify_request(self, request: object, client_address: object) -> bool:
        self.connections += 1
        return True


class Answer(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, content: bytes = IMAGE, status: int = 200, length: int | None = None, **headers: str) -> None:
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
            self.reply(**kind)
        elif path.startswith("/hop"):
            left = int(path.removeprefix("/hop"))
            self.reply(b"", 302, Location=f"/hop{left - 1}" if left > 1 else "/image")
        elif path == "/to":
            self.reply(b"", 302, Location=unquote(self.path.partition("?")[2]))
        elif path == "/large":
            self.reply(bytes(MOST + 1), **kind)
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


@contextmanager
def listening(address: str = "127.0.0.1") -> Iterator[Listener]:
    with Listener(address) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as server:
        yield server


def fetch(address: str, *ports: int, allowed: tuple[str, ...] = (), timeout_s: float = 5, redirects: int = 3) -> bytes:
    settings = UrlSettings(
        enabled=True, ports=ports or (80, 443), allowed_networks=allowed, timeout_s=timeout_s, redirects=redirects
    )

    async def run() -> bytes:
        fetcher = Fetcher(settings, MOST)
        try:
            return await fetcher.fetch(address, 30)
        finally:
            await fetcher.close()

    return asyncio.run(run())


LOCAL = ("127.0.0.0/8",)


def test_an_image_is_fetched_and_redirects_are_followed(listener: Listener) -> None:
    base = f"http://127.0.0.1:{listener.port}"
    assert fetch(f"{base}/image?size=1", listener.port, allowed=LOCAL) == IMAGE
    assert fetch(f"{base}/hop3", listener.port, allowed=LOCAL) == IMAGE
    assert fetch(f"http://localhost:{listener.port}/image", listener.port, allowed=(*LOCAL, "::1/128")) == IMAGE


@pytest.mark.parametrize(
    ("path", "error", "problem"),
    [
        ("/hop4", ImageNotFetched, "redirects more than 3 times"),
        ("/absent", ImageNotFetched, "status 404"),
        ("/html", ImageNotFetched, "no image but 'text/html'"),
        ("/bomb", ImageNotFetched, "compresses"),
        ("/large", ImageTooManyBytes, "over 10,000 bytes"),
        ("/lying", ImageTooManyBytes, "over 10,000 bytes"),
        ("/endless", ImageTooManyBytes, "over 10,000 bytes"),
        ("/slow", ImageNotFetched, "did not arrive within 1 s"),
        ("/to?ftp://127.0.0.1/x", ImageUrlForbidden, "scheme 'ftp'"),
        ("/to?file:///etc/passwd", ImageUrlForbidden, "scheme 'file'"),
        ("/to?http://user@127.0.0.1/x", ImageUrlForbidden, "without a user"),
        ("/to?http://127.0.0.1:22/x", ImageUrlForbidden, "port 22"),
        ("/to?http://[bad", ImageNotFetched, "cannot be read"),
    ],
)
def test_what_a_server_may_do(listener: Listener, path: str, error: type[ClipfleetError], problem: str) -> None:
    with pytest.raises(error, match=problem):
        fetch(f"http://127.0.0.1:{listener.port}{path}", listener.port, allowed=LOCAL, timeout_s=1)


# Each names this machine, or a network of its own, in another way.
EVASIONS = (
    "http://127.0.0.1:{port}/image",
    "http://127.0.0.2:{port}/image",
    "http://127.1:{port}/image",
    "http://127.0.1:{port}/image",
    "http://2130706433:{port}/image",
    "http://0x7f000001:{port}/image",
    "http://0x7f.0.0.1:{port}/image",
    "http://0x7f.1:{port}/image",
    "http://0177.0.0.1:{port}/image",
    "http://017700000001:{port}/image",
    "http://0:{port}/image",
    "http://0.0.0.0:{port}/image",
    "http://localhost:{port}/image",
    "http://LOCALHOST:{port}/image",
    "http://localhost.:{port}/image",
    "http://[::1]:{port}/image",
    "http://[0:0:0:0:0:0:0:1]:{port}/image",
    "http://[::]:{port}/image",
    "http://[::ffff:127.0.0.1]:{port}/image",
    "http://[::ffff:7f00:1]:{port}/image",
    "http://[::127.0.0.1]:{port}/image",
    "http://[64:ff9b::127.0.0.1]:{port}/image",
    "http://[2002:7f00:1::]:{port}/image",
    "http://[fe80::1]:{port}/image",
    "http://[fc00::1]:{port}/image",
    "http://[fec0::1]:{port}/image",
    "http://[ff02::1]:{port}/image",
    "http://10.0.0.1:{port}/image",
    "http://172.16.0.1:{port}/image",
    "http://192.168.1.1:{port}/image",
    "http://100.64.0.1:{port}/image",
    "http://169.254.169.254:{port}/latest/meta-data/",
    "http://[fd00:ec2::254]:{port}/latest/meta-data/",
    "http://192.0.0.1:{port}/image",
    "http://192.0.2.1:{port}/image",
    "http://198.18.0.1:{port}/image",
    "http://224.0.0.1:{port}/image",
    "http://240.0.0.1:{port}/image",
    "http://255.255.255.255:{port}/image",
    "http://user@127.0.0.1:{port}/image",
    "http://example.com@127.0.0.1:{port}/image",
    "http://127.0.0.1:{port}\\@example.com/image",
    "http://127.0.0.1%00.example.com:{port}/image",
    "http:127.0.0.1:{port}/image",
    "http:///127.0.0.1:{port}/image",
    "http://①②⑦.0.0.1:{port}/image",
    "http://127。0。0。1:{port}/image",
    "https://127.0.0.1:{port}/image",
    "HTTP://127.0.0.1:{port}/image",
    " http://127.0.0.1:{port}/image",
    "http://127.0.0.1:22/image",
    "http://127.0.0.1:0/image",
    "http://127.0.0.1:99999/image",
    "ftp://127.0.0.1:{port}/image",
    "gopher://127.0.0.1:{port}/image",
    "http://[fe80::1%é]:{port}/image",
    "http://[v1.x:é]:{port}/image",
    "http://127.0.0.1:{port}/\ud800",
    "http://{port}.\ud800.example/image",
    "file:///etc/passwd",
    "unix:/var/run/docker.sock",
)


@pytest.mark.parametrize("address", EVASIONS)
def test_nothing_inside_is_ever_connected_to(listener: Listener, address: str) -> None:
    with pytest.raises((ImageUrlForbidden, ImageNotFetched)):
        fetch(address.format(port=listener.port), listener.port, timeout_s=2)
    assert listener.connections == 0


def test_a_redirect_into_the_inside_is_not_followed() -> None:
    with listening() as outer, listening("127.0.0.9") as inner:
        ports = (outer.port, inner.port)
        for host in ("127.0.0.9", "0x7f000009", "[::ffff:127.0.0.9]"):
            address = f"http://127.0.0.1:{outer.port}/to?http://{host}:{inner.port}/image"
            with pytest.raises(ImageUrlForbidden):
                fetch(address, *ports, allowed=("127.0.0.1/32",))
        assert (outer.connections, inner.connections) == (3, 0)


def test_a_name_that_changes_its_address_after_the_check(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("127.0.0.9") as inner:
        answers = iter(["127.0.0.1", "127.0.0.9", "127.0.0.9"])
        resolve: Callable[..., object] = socket.getaddrinfo

        def changing(host: str, *arguments: object, **options: object) -> object:
            return resolve(next(answers) if host == "changing.example" else host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", changing)
        address = f"http://changing.example:{listener.port}/image"
        assert fetch(address, listener.port, allowed=("127.0.0.1/32",)) == IMAGE  # resolved once, connected to that
        with pytest.raises(ImageUrlForbidden, match=r"127\.0\.0\.9"):
            fetch(address, listener.port, allowed=("127.0.0.1/32",))
        assert (listener.connections, inner.connections) == (1, 0)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))
