"""Images by address: what is fetched, and what must never be connected to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from clipfleet.errors import ClipfleetError, ImageNotFetched, ImageTooManyBytes, ImageUrlForbidden, Overloaded
from clipfleet.settings import UrlSettings
from deployments.fetching import Fetcher, is_public
from tests.deployments.listener import IMAGE, LARGE, Listener, listening

MOST = LARGE - 1


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
    assert fetch(f"{base}/hangs-up-once", listener.port, allowed=LOCAL) == IMAGE
    assert fetch(f"http://localhost:{listener.port}/image", listener.port, allowed=(*LOCAL, "::1/128")) == IMAGE


@pytest.mark.parametrize(
    ("path", "error", "problem"),
    [
        ("/hop4", ImageNotFetched, "redirects more than 3 times"),
        ("/absent", ImageNotFetched, "status 404"),
        ("/hangs-up", ImageNotFetched, "disconnected"),
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


# Some resolvers know them, others do not.
NOT_EVERYWHERE = ("http://localhost.:{port}/image", "http://127.0.0.1%00.example.com:{port}/image")


@pytest.mark.parametrize("address", EVASIONS)
def test_nothing_inside_is_ever_connected_to(listener: Listener, address: str) -> None:
    # Without the check a connection to most of them would fail as well: it has to be the check that refuses them.
    with pytest.raises((ImageUrlForbidden, ImageNotFetched) if address in NOT_EVERYWHERE else ImageUrlForbidden):
        fetch(address.format(port=listener.port), listener.port, timeout_s=2)
    assert listener.connections == 0


def test_another_address_of_this_machine_is_not_connected_to() -> None:
    with listening("127.0.0.2") as inner:
        with pytest.raises(ImageUrlForbidden):
            fetch(f"http://127.0.0.2:{inner.port}/image", inner.port)
        assert inner.connections == 0


def test_names_that_nobody_answers_for_do_not_stop_others(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup is busy until the resolver gives up, long after the one who asked has gone."""
    resolve: Callable[..., object] = socket.getaddrinfo
    released = threading.Event()

    def slow(host: str, *arguments: object, **options: object) -> object:
        if host.endswith(".example"):
            released.wait(20)
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)

    async def ask() -> None:
        settings = UrlSettings(enabled=True, ports=(listener.port,), allowed_networks=LOCAL, timeout_s=0.3)
        fetcher = Fetcher(settings, 10_000)
        try:
            names = [f"http://{number}.example:{listener.port}/image" for number in range(4)]
            for _ in range(9):
                with pytest.raises(ImageNotFetched):
                    await asyncio.gather(*(fetcher.fetch(name, 10, "one") for name in names))
            assert await fetcher.fetch(f"http://127.0.0.1:{listener.port}/image", 10, "other") == IMAGE
            with pytest.raises(ImageNotFetched, match="still being looked up"):
                await fetcher.fetch(names[0], 10, "one")
        finally:
            released.set()
            await fetcher.close()

    asyncio.run(ask())


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
        with pytest.raises(ImageUrlForbidden, match="has no public address"):
            fetch(address, listener.port, allowed=("127.0.0.1/32",))
        assert (listener.connections, inner.connections) == (1, 0)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", ["168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::168.63.129.16"])
def test_the_host_of_a_virtual_machine_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


def test_a_refusal_does_not_say_where_a_name_leads(listener: Listener) -> None:
    with pytest.raises(ImageUrlForbidden) as refused:
        fetch(f"http://localhost:{listener.port}/image", listener.port)
    assert "localhost" in str(refused.value) and "127" not in str(refused.value) and "::1" not in str(refused.value)


def test_slow_servers_of_one_key_do_not_stop_another(listener: Listener) -> None:
    settings = UrlSettings(enabled=True, ports=(listener.port,), allowed_networks=LOCAL, timeout_s=20, at_once=4)

    async def ask() -> None:
        fetcher = Fetcher(settings, MOST)
        base = f"http://127.0.0.1:{listener.port}"
        slow = [asyncio.create_task(fetcher.fetch(f"{base}/slow", 20, "importer")) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert await fetcher.fetch(f"{base}/image", 5, "shop") == IMAGE
        with pytest.raises(Overloaded):
            await fetcher.fetch(f"{base}/image", 0.5, "importer")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await fetcher.close()

    asyncio.run(ask())
