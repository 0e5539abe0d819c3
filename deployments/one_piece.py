"""How an answer leaves an ingress: its head together with its body, and its connection not long after it.

Serve passes the two from one thread to another, so the HTTP server often writes the head alone and the body a moment later. A
replica that is killed in between leaves half an answer with the client, which HAProxy cannot ask for again; one that has sent
nothing costs nobody a request.

A request may be answered before all of it is there, such as one without its key. The HTTP server would wait for the rest for
ever if some of it came now and then, and HAProxy would keep one of its places for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl, httptools_impl

# For the rest of a request that is answered: a client that is cut off while it sends may not see the answer.
LINGER_S = 10.0


class _Joined:
    """Stands for a connection while a head and what follows are written, which then go out in one piece."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def hold_heads() -> None:
    """Have the HTTP server of this process keep a head until the body's first part is there, and end what is answered early."""
    for module in (h11_impl, httptools_impl):
        _hold_heads(module.RequestResponseCycle)


def _hold_heads(cycle: Any) -> None:
    send = cycle.send
    if getattr(send, "holds_heads", False):
        return

    async def send_together(self: Any, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.held_head = message
            return
        head = self.__dict__.pop("held_head", None)
        transport = self.transport
        if head is None:
            await send(self, message)
        else:
            self.transport = _Joined(transport)
            try:
                await send(self, head)
                await send(self, message)
            finally:
                self.transport.flush()
                self.transport = transport
        if self.response_complete and self.more_body:
            asyncio.get_running_loop().call_later(LINGER_S, _end, transport, self)

    send_together.holds_heads = True  # type: ignore[attr-defined]
    cycle.send = send_together


def _end(transport: Any, cycle: Any) -> None:
    protocol = transport.get_protocol()  # None where it is closed
    if protocol is not None and protocol.cycle is cycle:  # otherwise another request is under way, so the rest came
        transport.close()
