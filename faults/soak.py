"""Mixed load for half an hour: texts, single images, lists, broken ones and clients that leave. Nothing may grow.

Memory also grows whenever more is in flight at once than ever before, which clients that draw their requests go on doing for
long, ever more rarely: hence the long warm-up.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks.processes import below
from clipfleet.load import image_request, json_request
from faults.chaos import injected, leave, pictures
from faults.mutate import mutants
from faults.report import Row
from faults.served import config, serve

WARM_UP = 0.4  # of the time: caches fill, pools and heaps grow
EVERY_S = 5.0
SLOPE_MB_H = 20.0  # what a process may grow an hour within the noise of its measurement
MORE = 2  # threads of pools that start late, Ray's among them
CACHE_BYTES = 4 * 2**20  # of texts' vectors: full before the warm-up ends
CLIENTS = 8
PORT = 8500

Points = list[tuple[float, float]]  # (seconds, value)
Samples = dict[str, dict[str, Points]]  # of memory, descriptors and threads, by a process's name and id


def measure(seconds: float, seed: int, leak_bytes: int = 0) -> list[Row]:
    """With `leak_bytes` each JPEG leaks so many in its decoder: that has to be found, or the soak shows nothing."""
    if leak_bytes:
        with injected():
            os.environ["LEAK_BYTES"] = str(leak_bytes)
            try:
                return measure(seconds, seed)
            finally:
                del os.environ["LEAK_BYTES"]
    shown = [picture.body for picture in pictures("tiny", count=32)]
    seen: Counter[str] = Counter()
    stop = threading.Event()
    with serve(config({}, cache={"text_bytes": CACHE_BYTES}), "tiny", PORT) as served:
        clients = [
            threading.Thread(target=_client, args=(served.port, shown, seed + number, seen, stop), daemon=True)
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            samples = _watch(served.pid, seconds)
        finally:
            stop.set()
        for client in clients:
            client.join()
        alive = served.ready()
    bad = {what: count for what, count in seen.items() if what.startswith(("5", "error"))}
    answered = ", ".join(f"{what} {count}" for what, count in seen.most_common())
    return [
        Row(f"mixed load for {seconds / 60:.0f} minutes", f"{CLIENTS} clients", 1, answered, alive and not bad),
        _trend(samples),
        _leak(samples, "descriptors"),
        _leak(samples, "threads"),
        _replaced(samples),
    ]


def _client(port: int, shown: Sequence[bytes], seed: int, seen: Counter[str], stop: threading.Event) -> None:
    rng, broken, number = random.Random(seed), mutants(seed), itertools.count(seed * 10**6)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(request: object) -> None:
        connection.request("POST", request.path, request.body, request.headers)  # type: ignore[attr-defined]
        answer = connection.getresponse()
        answer.read()
        seen[str(answer.status)] += 1

    kinds: tuple[Callable[[], object], ...] = (
        lambda: ask(json_request(texts=[f"a picture of thing number {next(number)}"])),
        lambda: ask(image_request([rng.choice(shown)])),
        lambda: ask(json_request(texts=[f"one of many, {next(number)}" for _ in range(64)])),
        lambda: ask(image_request(rng.choices(shown, k=8))),
        lambda: ask(image_request([next(broken)])),
        lambda: leave(port, rng.choice(shown), rng.choice(("upload", "queue", "work"))),
    )
    while not stop.is_set():
        try:
            rng.choice(kinds)()
        except (OSError, http.client.HTTPException) as error:
            seen[f"error {type(error).__name__}"] += 1
            connection.close()
    connection.close()


def _watch(pid: int, seconds: float) -> Samples:
    samples: Samples = {what: defaultdict(list) for what in ("memory", "descriptors", "threads")}
    names: dict[int, str] = {}
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        for process, name in below(pid).items():
            home = Path("/proc", str(process))
            with suppress(OSError, ValueError):
                status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines() if ":" in line)
                key = names.setdefault(process, f"{name} {process}")  # an actor's title has what it does besides
                samples["memory"][key].append((now, int(status["VmRSS"].split()[0]) / 1024))
                samples["threads"][key].append((now, float(status["Threads"])))
                samples["descriptors"][key].append((now, len(os.listdir(home / "fd"))))
        time.sleep(EVERY_S)
    Path("build").mkdir(exist_ok=True)
    Path("build", "soak.json").write_text(json.dumps(samples))
    return samples


def _trend(samples: Samples) -> Row:
    """The steepest rise of any process's memory after the warm-up, with the confidence of its slope (least squares, 95%).

    Of each minute the least counts: what a request in flight takes comes back. Neighbouring minutes are much alike, so there is
    less in them than in as many independent ones (the correction for a first-order autocorrelation, of 2 at most: what grows in
    a curve is alike, too).
    """
    slopes = {}
    for name, points in samples["memory"].items():
        least = _least_of_minutes(_later(points, samples["memory"]))
        if len(least) < 5:
            continue
        at, value = np.array(list(least)) / 60, np.array(list(least.values()))
        slope, offset = np.polyfit(at, value, 1)
        rest = value - (slope * at + offset)
        error = 1.96 * np.sqrt((rest**2).sum() / (len(at) - 2) / ((at - at.mean()) ** 2).sum())
        alike = np.clip((rest[1:] * rest[:-1]).sum() / max((rest**2).sum(), 1e-9), 0.0, 0.6)
        slopes[name] = float(slope), float(error * np.sqrt((1 + alike) / (1 - alike)))
    worst = sorted(slopes.items(), key=lambda item: -(item[1][0] - item[1][1]))[:4]
    listed = (
        ", ".join(f"{name} {slope:+.1f} ± {error:.1f}" for name, (slope, error) in worst) or "too short for a slope"
    )

    kept = bool(slopes) and all(slope - error <= SLOPE_MB_H for slope, error in slopes.values())
    return Row("growth of memory, MB an hour", f"{len(slopes)} processes", 1, listed, kept)


def _leak(samples: Samples, what: str) -> Row:
    """How many more descriptors or threads a process never falls below in the last third than it ever had in the first."""
    more = {}
    for name, points in samples[what].items():
        later = _later(points, samples[what])
        third = len(later) // 3
        if third >= 3:
            more[name] = min(value for _, value in later[-third:]) - max(value for _, value in later[:third])
    worst = sorted(more.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name} {number:+.0f}" for name, number in worst)
    kept = bool(more) and all(number <= MORE for number in more.values())
    return Row(f"{what} that stay, after the warm-up", f"{len(more)} processes", 1, listed, kept)


def _later(points: Points, of_all: Mapping[str, Points]) -> Points:
    end = max(points[-1][0] for points in of_all.values())
    return [(at, value) for at, value in points if at > WARM_UP * end]


def _least_of_minutes(points: Points) -> dict[int, float]:
    """The least value of each minute of which there are samples enough: of a few seconds the least is no low one."""
    minutes: dict[int, list[float]] = defaultdict(list)
    for at, value in points:
        minutes[int(at // 60)].append(value)
    return {minute: min(values) for minute, values in minutes.items() if len(values) * EVERY_S > 30}


def _replaced(samples: Samples) -> Row:
    """Processes that began or ended after the warm-up, such as a replica that died: their memory says nothing."""
    end = max(points[-1][0] for points in samples["memory"].values())
    changed = [
        name
        for name, points in samples["memory"].items()
        if points[0][0] > WARM_UP * end or points[-1][0] < end - 3 * EVERY_S
    ]
    return Row("processes that began or ended", "", 1, ", ".join(changed) or "none", not changed)
