"""A call of gRPC's that is cancelled gives its memory back.

grpc.aio frees what a call holds outside of Python when the task that waits for it goes on, and so never if that task was
cancelled: a kilobyte or more for each client that leaves (github.com/grpc/grpc/issues/43360, in 1.66 to 1.85). Here a task
of its own waits, which nobody cancels. The call itself is cancelled as before, and that ends the wait.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc._cython import cygrpc
from grpc.aio._call import UnaryUnaryCall

_invoke = UnaryUnaryCall._invoke


async def _invoke_and_free(self: Any) -> Any:
    try:
        return await asyncio.shield(asyncio.ensure_future(_invoke(self)))
    except asyncio.CancelledError:
        if not self.cancelled():
            self.cancel()
        return cygrpc.EOF  # type: ignore[attr-defined]  # of which gRPC makes a CancelledError


def free_cancelled_calls() -> None:
    """Have all unary calls of this process do so."""
    UnaryUnaryCall._invoke = _invoke_and_free  # type: ignore[method-assign]
