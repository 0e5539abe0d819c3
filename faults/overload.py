"""More requests than the service can answer, at a rate that does not wait for answers: what is refused, and how soon."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.processes import memory
from faults.chaos import pictures
from faults.report import Row
from faults.served import Served, config, serve
from faults.traffic import Picture, traffic

FACTORS = (0.5, 1, 2, 5, 10)
DEADLINE_S = 30
REFUSED_S = 0.25
WARM_S = 15


@dataclass
class Offered:
    """What came of one rate."""

    factor: float
    rate: float
    seconds: float
    accepted: list[float] = field(default_factory=list)  # seconds that each took
    refused: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    without_advice: int = 0  # refusals that lack Retry-After
    texts: Counter[str] = field(default_factory=Counter)  # of one client beside, by status
    megabytes: float = 0.0

    def figures(self) -> dict[str, float]:
        """What plot.py draws."""
        return {
            "factor": self.factor,
            "accepted_rate": len(self.accepted) / self.seconds,
            "refused_rate": len(self.refused) / self.seconds,
            "megabytes": self.megabytes,
        }

    def __str__(self) -> str:
        others = f", {dict(self.others)}" if self.others else ""
        texts = ", ".join(f"{status} {count}" for status, count in self.texts.most_common())
        return (
            f"{self.factor:g} x capacity ({self.rate:.0f}/s): accepted {len(self.accepted) / self.seconds:.1f}/s, "
            f"p99 {_p99(self.accepted):.1f} s; refused {len(self.refused)}, p99 {_p99(self.refused) * 1000:.0f} ms"
            f"{others}; texts beside: {texts}; {self.megabytes:.0f} MB"
        )


def _p99(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 99)) if seconds else 0.0


@contextmanager
def _first() -> Iterator[None]:
    """Let this thread run whenever it has something to do, as the clients of other machines would. Takes root.

    The kernel divides the cores among sessions before it looks at threads (sched(7), autogroup), and kept this session, which
    mostly sleeps, waiting for up to a second while the service's had both: late was then whoever reads the answers.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    _set_priority(before - 10)
    try:
        yield
    finally:
        _set_priority(before)


def _set_priority(nice: int) -> None:
    with suppress(OSError):  # not root, or a kernel that knows no such groups
        os.setpriority(os.PRIO_PROCESS, 0, nice)  # of this thread
        Path("/proc/self/autogroup").write_text(str(nice))


async def _one(port: int, body: bytes, found: Offered) -> None:
    began = time.monotonic()
    head = (
        "POST /v1/embeddings/images HTTP/1.1\r\nHost: here\r\nAccept: application/x-npy\r\nConnection: close\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        async with asyncio.timeout(3 * DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + body)
                await writer.drain()
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        found.others[type(error).__name__] += 1
        return
    took = time.monotonic() - began
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/") else b"none"
    if status == b"200":
        found.accepted.append(took)
    elif status == b"429":
        found.refused.append(took)
        found.without_advice += b"retry-after:" not in answer.partition(b"\r\n\r\n")[0].lower()
    else:
        found.others[status.decode()] += 1


def _ask_texts(port: int, found: Offered, stop: threading.Event) -> None:
    for number in itertools.count():
        if stop.wait(0.2):
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3 * DEADLINE_S)
        body = json.dumps({"input": f"a picture of thing {number} at {found.factor} times the capacity"})
        try:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            found.texts[str(connection.getresponse().status)] += 1
        except (OSError, http.client.HTTPException) as error:
            found.texts[type(error).__name__] += 1
        finally:
            connection.close()


async def _offer(served: Served, shown: Sequence[Picture], factor: float, rate: float, seconds: float) -> Offered:
    found = Offered(factor, rate, seconds)
    tasks = set()
    stop = threading.Event()
    beside = asyncio.create_task(asyncio.to_thread(_ask_texts, served.port, found, stop))
    began = time.monotonic()
    try:
        for number, picture in enumerate(itertools.cycle(shown)):
            due = began + number / rate
            if due > began + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(_one(served.port, picture.body, found))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        found.megabytes = sum((await asyncio.to_thread(memory, served.pid)).values())
    finally:
        stop.set()
    await asyncio.gather(*tasks, beside)
    return found


def _rate(served: Served, shown: Sequence[Picture]) -> float:
    """Requests a second that clients get answered who wait for their answers."""
    with traffic(served.port, shown) as seen:
        time.sleep(WARM_S)
        answered = seen.answered
    return answered / WARM_S


def measure(seconds: float) -> list[Row]:
    checkpoint = data.checkpoint()
    shown = pictures(checkpoint, count=48)
    with serve(config({}), checkpoint) as served:
        _rate(served, shown)  # warms up
        capacity = _rate(served, shown)
        print(f"capacity: {capacity:.1f} requests/s from 16 clients", flush=True)
        found = []
        for factor in FACTORS:
            with _first():
                found.append(asyncio.run(_offer(served, shown, factor, factor * capacity, seconds)))
            print(found[-1], flush=True)
        served.until_ready()
    Path("build").mkdir(exist_ok=True)
    Path("build", "overload.json").write_text(json.dumps([each.figures() for each in found]))
    best = max(len(each.accepted) for each in found) / seconds
    rows = []
    for each in found:
        late = sum(took > DEADLINE_S for took in each.accepted)
        kept = not each.others and not late and not each.without_advice and _p99(each.refused) <= REFUSED_S
        kept = kept and set(each.texts) == {"200"}  # they have a lane of their own
        kept = kept and (each.factor <= 1 or len(each.accepted) / seconds >= 0.9 * best)
        rows.append(Row(f"{each.factor:g} times the capacity", f"{each.rate:.0f} requests/s", 1, str(each), kept))
    return rows
