"""Cancelled calls of gRPC give back what they hold outside of Python."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the KiB that the C library has handed out after each 500 cancelled calls, then what came of a call that was not.
_CALLS = """
import asyncio, ctypes, json, sys
import grpc
from grpc import aio

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
reached = []

async def answer(request, context):
    try:
        await asyncio.sleep(60 if request == b"slow" else 0)
        return b"answer"
    except asyncio.CancelledError:
        reached.append(request)
        raise

async def main():
    server = aio.server()
    handlers = {"Method": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = aio.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_unary("/Service/Method")

    async def wait(started):
        return await started

    async def leave(by_task):
        started = call(b"slow")
        waiting = asyncio.ensure_future(wait(started))
        await asyncio.sleep(0.02)
        (waiting if by_task else started).cancel()
        try:
            await waiting
        except asyncio.CancelledError:
            return started.cancelled()

    used = []
    for _ in range(5):
        for number in range(20):
            assert all(await asyncio.gather(*(leave(number % 2) for _ in range(25))))
        await asyncio.sleep(0.2)
        used.append(libc.mallinfo2().uordblks // 1024)
    early = call(b"slow")
    early.cancel()
    try:
        await early
    except asyncio.CancelledError:
        print(json.dumps({"used": used, "reached": len(reached), "answer": (await call(b"fast")).decode()}))
    await channel.close()
    await server.stop(0)

asyncio.run(main())
"""


def outcome(first: str) -> dict[str, object]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{_CALLS}"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc counts what it has handed out")
def test_a_cancelled_call_is_freed() -> None:
    plain = outcome("")
    ours = outcome("from deployments import grpc_calls; grpc_calls.free_cancelled_calls()")
    leaked, kept = (found["used"][-1] - found["used"][0] for found in (plain, ours))  # type: ignore[index]
    assert leaked > 800, "gRPC frees them itself: deployments/grpc_calls.py can go"
    assert kept < 200
    assert ours["answer"] == "answer"
    assert ours["reached"] > 2000, "the other side is told"  # type: ignore[operator]
