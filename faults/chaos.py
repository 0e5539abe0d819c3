"""Replicas, proxies and clients that die while 16 clients send photographs: what fails, and whether a vector is wrong."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import data
from benchmarks.processes import memory
from clipfleet import CLIPEmbedder
from clipfleet.checkpoint import find_checkpoint
from clipfleet.encoder import Encoder
from clipfleet.fingerprint import fingerprint
from clipfleet.images import decode
from clipfleet.load import image_request
from deployments.haproxy_wrapper import BUFFER_BYTES_ALONE
from faults.report import Row
from faults.served import ROOT, Served, config, serve
from faults.traffic import Picture, Seen, post, traffic

CLIENTS = 16
CRASHING = b"clipfleet: end this process"  # injected/sitecustomize.py
FORWARD_S = 4
GAP_S = 2.0
GROWN_MB = 50.0
SETTLED_S = 60.0  # replicas give back what they keep twice a minute (deployments/memory.py)
BODY_BYTES = 4 * 2**20
SIDE = 1182  # pixels of an uncompressed picture of just under 4 MiB
PROCESSES = (
    ("ServeController", "the Serve controller"),
    ("haproxy", "HAProxy"),
    ("HAProxyManager", "Serve's HAProxyManager"),
)


def pictures(*models: str | Path, count: int = 96) -> list[Picture]:
    """Photographs, with their vectors by the library."""
    files = data.files(data.photographs(data.LIBRARY_FILES))[:count]
    vectors = {fingerprint(find_checkpoint(str(model))): vectors_of(model, files) for model in models}
    return [
        Picture(file.read_bytes(), {made_by: found[number : number + 1] for made_by, found in vectors.items()})
        for number, file in enumerate(files)
    ]


def vectors_of(model: str | Path, files: Sequence[Path]) -> np.ndarray:
    with CLIPEmbedder(str(model), "cpu") as embedder:
        found = asyncio.run(embedder.generate_embeddings_batch([str(file) for file in files], show_progress=False))
    return np.stack([vector for vector in found if vector is not None])


def kill_replicas(served: Served, deployments: Sequence[str], every_s: float, seconds: float, least: int = 1) -> int:
    """`kill -9` a random replica of the deployments every so often, where more than `least` of its kind live."""
    killed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(every_s)
        able = [pid for name in deployments if len(found := served.replicas(name)) > least for pid in found]
        if able:
            victim = random.choice(able)
            print(f"{time.strftime('%T')} kill -9 {victim} ({served.processes().get(victim)})", flush=True)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed += 1
    return killed


def dying_replicas(model: str, folder: str | Path, seconds: float) -> list[Row]:
    shown = pictures(folder)
    rows = []
    with serve(config({"Ingress": 2, "ImageDecoder": 2, "ImageEncoder": 2}), folder) as served:
        for names, every in ((("ImageDecoder", "ImageEncoder"), 5.0), (("Ingress",), 10.0)):
            with traffic(served.port, shown, CLIENTS) as seen:
                killed = kill_replicas(served, names, every, seconds)
                time.sleep(3)
            what = " or ".join(names)
            rows.append(row_of(f"`kill -9` of a random {what} every {every:.0f} s, {model}", killed, seen))
            served.until_ready()
    return rows


def dying_under_lists(seconds: float) -> list[Row]:
    """Requests of 16 images, all of which the only encoder has in hand when it dies."""
    single = pictures("tiny", count=64)
    shown = []
    for first in range(0, len(single), 16):
        part = single[first : first + 16]
        request = image_request([picture.body for picture in part])
        (made_by,) = part[0].vectors
        vectors = np.concatenate([picture.vectors[made_by] for picture in part])
        shown.append(Picture(request.body, {made_by: vectors}, request.headers["Content-Type"]))
    with serve(config({}), "tiny") as served, traffic(served.port, shown, 4) as seen:
        killed = kill_replicas(served, ["ImageDecoder", "ImageEncoder"], 10.0, seconds, least=0)
        time.sleep(10)
    row = row_of("`kill -9` of the only ImageDecoder or ImageEncoder every 10 s, lists of 16, tiny", killed, seen)
    return [replace(row, load="4 clients, 16 photographs a request")]


def dying_under_large_bodies(seconds: float) -> list[Row]:
    """Bodies as large as HAProxy can send again, by clients that do not try again."""
    encoder, rng, shown = Encoder("tiny", "cpu"), np.random.default_rng(4), []
    made_by = fingerprint(encoder.checkpoint)
    for _ in range(CLIENTS):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "BMP")
        body = file.getvalue().ljust(BODY_BYTES, b"\0")
        vector = encoder.encode_pixels(decode(body, encoder.checkpoint.pixels).pixels[None])
        shown.append(Picture(body, {made_by: vector}))
    encoder.close()
    with serve(config({"Ingress": 2}), "tiny") as served, traffic(served.port, shown, CLIENTS) as seen:
        killed = kill_replicas(served, ["Ingress"], 10.0, seconds)
        time.sleep(3)
    row = row_of("`kill -9` of a random Ingress every 10 s, bodies of 4 MiB, tiny", killed, seen)
    return [replace(row, load=f"{CLIENTS} clients")]


@contextmanager
def injected() -> Iterator[Path]:
    """Services that are started in the block have the faults of injected/sitecustomize.py; yields their folder of flags."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PYTHONPATH": str(ROOT / "faults" / "injected"), "FAULTS": folder}
        try:
            yield Path(folder)
        finally:
            del os.environ["PYTHONPATH"], os.environ["FAULTS"]


def crashing_image(seconds: float) -> list[Row]:
    """An image that ends whichever process decodes it, beside good ones that share its decoder."""
    shown = pictures("tiny")
    jpeg = io.BytesIO()
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(jpeg, "JPEG", comment=CRASHING)
    answers: list[str] = []
    with injected(), serve(config({"ImageDecoder": 2}), "tiny") as served, traffic(served.port, shown, CLIENTS) as seen:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = post(served.port, jpeg.getvalue())
            answers.append(f"{answer.status} {json.loads(answer.body)['error']['code']}")
            print(f"{time.strftime('%T')} the crashing image got {answers[-1]}", flush=True)
            time.sleep(5)
    named = answers.count("422 image_crashed_decoder")
    row = row_of("an image that ends its decoder's process, every 5 s, tiny", len(answers), seen)
    outcome = f"{named} of {len(answers)} named by 422 `image_crashed_decoder`; others: {row.outcome}"
    return [Row(row.fault, row.load, row.count, outcome, row.kept and named == len(answers) > 0)]


def failing_model(seconds: float) -> list[Row]:
    """Forward passes that hang, and some that raise; then a replica that stands still."""
    shown = pictures("tiny")
    rows = []
    with injected() as flags, serve(config({"ImageEncoder": 2}, limits={"forward_s": FORWARD_S}), "tiny") as served:
        for fault, pause in (("hang", 15.0), ("raise", 3.0)):
            done = 0
            with traffic(served.port, shown, CLIENTS) as seen:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    (flags / fault).touch()
                    time.sleep(pause)
                    done += not (flags / fault).exists()
                    print(f"{time.strftime('%T')} {fault}: {done} done", flush=True)
            row = row_of(f"a forward pass that {fault}s, tiny", done, seen)
            if fault == "raise":  # the batch gets 503 and is told to try again; nobody else may notice
                row = replace(row, kept=done > 0 and not seen.wrong and set(seen.failures) <= {"status 503"})
            rows.append(row)
            served.until_ready()
        rows.append(_standing_still(served, shown))
    return rows


def _standing_still(served: Served, shown: Sequence[Picture]) -> Row:
    """SIGSTOP: the process lives, and answers nothing. What it held fails at its deadline; it is replaced."""
    (victim, _) = served.replicas("ImageEncoder")
    with traffic(served.port, shown, CLIENTS) as seen:
        time.sleep(3)
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        print(f"{time.strftime('%T')} SIGSTOP {victim} (ImageEncoder)", flush=True)
        while victim in served.replicas("ImageEncoder") and time.monotonic() - stopped < 180:
            time.sleep(0.5)
        replaced_s = time.monotonic() - stopped
        time.sleep(10)
        after = Counter(seen.failures)
        time.sleep(20)
    served.until_ready()
    row = row_of("SIGSTOP of an ImageEncoder, tiny", 1, seen)
    kept = not seen.wrong and set(seen.failures) <= {"status 504"} and seen.failures == after and replaced_s < 120
    return replace(row, outcome=f"{row.outcome}; replaced after {replaced_s:.0f} s", kept=kept)


def other_processes(seconds: float) -> list[Row]:
    """The Serve controller, HAProxy, and the actor of Serve that owns it."""
    shown = pictures("tiny")
    rows = []
    with serve(config({"Ingress": 2, "ImageDecoder": 2}), "tiny") as served:
        for name, what in PROCESSES:
            killed = 0
            with traffic(served.port, shown, CLIENTS) as seen:
                time.sleep(3)
                for pid in [pid for pid, title in served.processes().items() if title.startswith(name)]:
                    print(f"{time.strftime('%T')} kill -9 {pid} ({name})", flush=True)
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                time.sleep(seconds / 2)
            row = row_of(f"`kill -9` of {what}, tiny", killed, seen)
            if name == "haproxy":  # its connections go with it; the promise is that there is another at once
                row = replace(row, kept=killed > 0 and not seen.wrong and seen.gap_s < GAP_S)
            rows.append(row)
            served.until_ready()
    return rows


def leaving_clients(count: int = 500) -> list[Row]:
    """Clients that go away in mid-upload, in the queue and in the forward pass; slow uploads; half-open connections."""
    shown = pictures("tiny")
    fault = f"{count} clients that leave, 16 uploads of a byte a second, 600 half-open connections, tiny"
    with serve(config({}), "tiny") as served:
        # The first time pools and buffers grow to what such clients need. What grew again the second time would be lost.
        first = row_of(fault, count, _leaving(served, shown, count))
        before = memory(served.pid)
        seen = _leaving(served, shown, count)
        after = memory(served.pid)
    row = row_of(fault, count, seen)
    grown = sum(after.values()) - sum(before.values())
    most = max(after, key=lambda name: after[name] - before.get(name, 0))
    outcome = (
        f"{row.outcome}; memory {sum(before.values()):.0f} MB after the first time, {grown:+.0f} MB after the second, of "
        f"which {most} {after[most] - before.get(most, 0):+.0f}"
    )
    return [
        replace(row, load="4 clients, photographs", outcome=outcome, kept=first.kept and row.kept and grown < GROWN_MB)
    ]


def _leaving(served: Served, shown: Sequence[Picture], count: int) -> Seen:
    """What the others saw meanwhile."""
    with traffic(served.port, shown, 4) as seen:
        slow = [threading.Thread(target=_slow_upload, args=(served.port, 20), daemon=True) for _ in range(16)]
        for thread in slow:
            thread.start()
        half_open = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(600)]
        for number in range(count):
            leave(served.port, shown[number % len(shown)].body, ("upload", "queue", "work")[number % 3])
        for thread in slow:
            thread.join()
        for connection in half_open:
            connection.close()
    time.sleep(SETTLED_S)
    return seen


def leave(port: int, body: bytes, when: str) -> None:
    """Send an image and go away: in mid-upload, in the queue, or while it is worked on."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = (
        "POST /v1/embeddings/images HTTP/1.1\r\nHost: here\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with connection:
        connection.sendall(head.encode())
        connection.sendall(body[: len(body) // 2] if when == "upload" else body)
        time.sleep({"upload": 0.0, "queue": 0.005, "work": 0.05}[when])


def _slow_upload(port: int, seconds: float) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest("POST", "/v1/embeddings/images")
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", "2000000")
    with suppress(OSError):
        connection.endheaders()
        connection.send(bytes(BUFFER_BYTES_ALONE))  # what HAProxy holds back; the rest is an ingress's
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.send(b"x")
            time.sleep(1)
    connection.close()


def row_of(fault: str, count: int, seen: Seen) -> Row:
    """What came of `count` faults that the clients have seen."""
    print(f"{fault}: {count} times; {seen}", flush=True)
    return Row(fault, f"{CLIENTS} clients, photographs", count, str(seen), count > 0 and seen.failed == 0)


def measure(seconds: float) -> list[Row]:
    """Every kind of fault, each for about so many seconds."""
    full_size = data.checkpoint()
    return [
        *dying_replicas("tiny", "tiny", seconds),
        *dying_replicas("full-size", full_size, seconds),
        *dying_under_lists(seconds),
        *dying_under_large_bodies(seconds),
        *crashing_image(seconds),
        *failing_model(seconds),
        *other_processes(seconds),
        *leaving_clients(),
    ]
