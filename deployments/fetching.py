"""Images by their http(s) address: fetched with caps on everything, and never from inside one's own network.

A name is resolved here, its addresses are checked, and the connection goes to an address that was checked: nothing that
the name may resolve to a moment later is ever connected to. Each redirect passes the same checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore
from httpcore import AsyncNetworkStream
from loguru import logger

from clipfleet.errors import DeadlineExceeded, ImageNotFetched, ImageTooManyBytes, ImageUrlForbidden, Overloaded
from clipfleet.settings import UrlSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")  # IPv4 in IPv6, as it once was
_AZURE = ipaddress.ip_address("168.63.129.16")
_REDIRECTS = (301, 302, 303, 307, 308)
_LOOKUPS = 4  # of names, for each image that may arrive at once
_LONGEST = 2048  # characters of an address
_KEPT = "/%:@!$&'()*+,;=~-._"  # of a path: what is quoted already stays as it is
_HEADERS = [(b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"clipfleet")]
_OF_KEY: ContextVar[str | None] = ContextVar("key", default=None)  # whose image this task fetches


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's: none of this machine, of a private network, of a link or of a group.

    An IPv6 address that carries an IPv4 one is as public as that. One that looks public is of Azure's hosts, and answers their
    guests alone, with secrets of theirs (https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16).
    """
    if isinstance(address, ipaddress.IPv6Address):
        if carried := _carried(address):
            return is_public(carried)
        if address in ipaddress.ip_network("2001::/23") or address.is_site_local:
            return False
    if address == _AZURE:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _carried(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, and to nothing else."""

    def __init__(self, allowed: Iterable[str], lookups: int) -> None:
        # Threads of its own: one whose name server does not answer is busy for longer than anyone waits for it, and asyncio's
        # few would soon be all busy with names of one key.
        self._lookups = ThreadPoolExecutor(lookups, "look-up")
        self._most = max(1, lookups // 4)  # of one key
        self._busy: Counter[str] = Counter()  # the threads of each
        self._lock = threading.Lock()
        self._allowed = [ipaddress.ip_network(network) for network in allowed]
        self._network: Any = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        """Resolve, check and connect. Raises ImageUrlForbidden, or httpcore's own errors."""
        addresses = await self._resolve(host, port)
        checked = [address for address in addresses if self._may(address)]
        if not checked:
            # Which one it is would tell a caller about a network that it cannot see.
            logger.info("an image's address was refused: {!r} is at {}", host, addresses[0])
            raise ImageUrlForbidden(f"{host!r} has no public address")
        return await self._network.connect_tcp(str(checked[0]), port, timeout, local_address, socket_options)

    async def _resolve(self, host: str, port: int) -> list[Address]:
        try:
            # The resolver also knows the old spellings of an address: 2130706433, 0x7f.1, 0177.0.0.1.
            found = await self._look_up(host, port)
            return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        except (OSError, UnicodeError, ValueError) as error:
            raise ImageNotFetched(f"{host!r} cannot be resolved: {error}") from None

    async def _look_up(self, host: str, port: int) -> list[Any]:
        key = _OF_KEY.get()
        with self._lock:
            if key is not None and self._busy[key] >= self._most:
                raise ImageNotFetched("the names of this API key's other images are still being looked up; try again")
            self._busy[key or ""] += 1

        def ended(_: object) -> None:  # or was never begun; whoever asked may be gone for long
            with self._lock:
                self._busy[key or ""] -= 1

        work = self._lookups.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        work.add_done_callback(ended)
        return await asyncio.wrap_future(work)

    def _may(self, address: Address) -> bool:
        return is_public(address) or any(address in network for network in self._allowed)


class Fetcher:
    """Fetches images for an ingress replica."""

    def __init__(self, settings: UrlSettings, image_bytes: int) -> None:
        self._settings = settings
        self._most = image_bytes
        self._at_once = asyncio.Semaphore(settings.at_once)
        self._of_key: dict[str | None, asyncio.Semaphore] = {}  # as many as there are keys
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=settings.at_once,
            keepalive_expiry=5.0,
            network_backend=CheckedNetwork(settings.allowed_networks, _LOOKUPS * settings.at_once),
        )

    async def fetch(self, address: str, seconds: float, key: str | None = None) -> bytes:
        """The image at an address, within so many seconds, for who has the API key of that name.

        Raises ImageUrlForbidden, ImageNotFetched or ImageTooManyBytes; Overloaded where others' images took all the time, and
        DeadlineExceeded.
        """
        end = time.monotonic() + seconds
        _OF_KEY.set(key)
        async with self._turn(key, seconds):
            try:
                async with asyncio.timeout(min(end - time.monotonic(), self._settings.timeout_s)):
                    for _ in range(1 + self._settings.redirects):
                        found = await self._get_again(_parse(address, self._settings.ports))
                        if isinstance(found, bytes):
                            return found
                        address = found
            except TimeoutError:
                if time.monotonic() >= end:  # the request's own time
                    raise DeadlineExceeded("the deadline passed before the images by address had arrived") from None
                raise ImageNotFetched(f"the image did not arrive within {self._settings.timeout_s:g} s") from None
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
                raise ImageNotFetched(f"the image cannot be fetched: {type(error).__name__} {error}".rstrip()) from None
        raise ImageNotFetched(f"the address redirects more than {self._settings.redirects} times")

    @asynccontextmanager
    async def _turn(self, key: str | None, seconds: float) -> AsyncIterator[None]:
        """One of the places for images that arrive. A key has half of them, so that slow servers of one do not stop another."""
        half = max(1, self._settings.at_once // 2) if key is not None else self._settings.at_once
        own = self._of_key.setdefault(key, asyncio.Semaphore(half))
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(seconds):
                    await held.enter_async_context(own)
                    await held.enter_async_context(self._at_once)
            except TimeoutError:
                raise Overloaded("other images by address took all the time; try again", retry_after=1) from None
            yield

    async def _get_again(self, url: httpcore.URL) -> bytes | str:
        """Try twice: a server may close a connection that was kept at the moment when it is used again."""
        try:
            return await self._get(url)
        except (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError):
            return await self._get(url)

    async def _get(self, url: httpcore.URL) -> bytes | str:
        """The content, or the address that it redirects to."""
        host = url.host.decode()
        named = f"[{host}]" if ":" in host else host
        port = f":{url.port}" if url.port else ""
        headers = [(b"Host", f"{named}{port}".encode()), *_HEADERS]
        async with self._pool.stream("GET", url, headers=headers) as answer:
            given = {name.lower(): value.decode("latin-1").strip() for name, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in given:
                try:
                    return urljoin(bytes(url).decode("latin-1"), given[b"location"])
                except ValueError as error:
                    raise ImageNotFetched(f"the address redirects to one that cannot be read: {error}") from None
            if answer.status != 200:
                raise ImageNotFetched(f"the image's server answers with status {answer.status}")
            kind = given.get(b"content-type", "application/octet-stream").lower()
            if not kind.startswith(("image/", "application/octet-stream", "binary/octet-stream")):
                raise ImageNotFetched(f"the address holds no image but {kind[:100]!r}")
            if given.get(b"content-encoding", "identity").lower() != "identity":
                raise ImageNotFetched("the image's server compresses although it was asked not to")
            announced = given.get(b"content-length", "")
            self._check(int(announced) if announced.isdecimal() else 0)
            content = bytearray()
            async for piece in answer.aiter_stream():
                self._check(len(content) + len(piece))
                content += piece
            return bytes(content)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ImageTooManyBytes(f"the image has over {self._most:,} bytes, which is the limit", limit=self._most)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.aclose()


def _parse(address: str, ports: Iterable[int]) -> httpcore.URL:
    """An address as what may be asked for. Raises ImageUrlForbidden."""
    if len(address) > _LONGEST:
        raise ImageUrlForbidden(f"the address has {len(address):,} characters; the limit is {_LONGEST:,}")
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ImageUrlForbidden(f"the address cannot be read: {error}") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise ImageUrlForbidden(f"scheme {scheme!r} is not fetched; http and https are")
    if not host or "@" in parts.netloc or "\\" in address or any(ord(letter) <= 32 for letter in address.strip()):
        raise ImageUrlForbidden("the address must be plain: http(s)://host/path, without a user")
    port = port or (443 if scheme == "https" else 80)
    if port not in ports:
        raise ImageUrlForbidden(f"port {port} is not fetched from; {', '.join(map(str, sorted(ports)))} are")
    try:
        name = (host if ":" in host else host.encode("idna").decode()).encode("ascii")
        target = quote(parts.path or "/", safe=_KEPT) + (
            "?" + quote(parts.query, safe=f"{_KEPT}?") if parts.query else ""
        )
    except UnicodeError:  # no name of a host, or letters that no encoding has
        raise ImageUrlForbidden("the address holds letters that no address has") from None
    return httpcore.URL(scheme=scheme, host=name, port=port, target=target)
