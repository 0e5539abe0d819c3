"""A call of gRPC's that is cancelled gives its memory back.

grpc.aio frees what a call holds outside of Python when the task that waits for it goes on, and so never if that task was
cancelled: a kilobyte or more for each client that leaves (github.com/grpc/grpc/issues/43360, in 1.66 to 1.85). Here a task
of its own waits, which is not cancelled. The call itself is cancelled as before, and that ends the wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from grpc.aio._call import UnaryUnaryCall

_invoke = UnaryUnaryCall._invoke
_add_done_callback = UnaryUnaryCall.add_done_callback


async def _invoke_and_free(self: Any) -> Any:
    batch = asyncio.ensure_future(_invoke(self))
    batch.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for its error any more
    try:
        return await asyncio.shield(batch)
    except asyncio.CancelledError:
        if not self.cancelled():
            self.cancel()
        raise


def _add_done_callback_once(self: Any, callback: Callable[[Any], None]) -> None:
    """Before 1.84 gRPC calls back at a cancellation, and again when the wait ends. Ray counts its requests by this."""
    left = [callback]
    _add_done_callback(self, lambda call: left.pop()(call) if left else None)


def free_cancelled_calls() -> None:
    """Have all unary calls of this process do so."""
    UnaryUnaryCall._invoke = _invoke_and_free  # type: ignore[method-assign]
    UnaryUnaryCall.add_done_callback = _add_done_callback_once  # type: ignore[method-assign]
