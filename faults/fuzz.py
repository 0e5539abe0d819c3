"""Damaged and hostile files through the decoder in a child process, and through HTTP."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from clipfleet.checkpoint import find_checkpoint
from clipfleet.decode_process import DecodeProcess
from clipfleet.errors import ClipfleetError, ImageCrashedDecoder
from clipfleet.image_files import decoding_bytes, open_image
from faults.mutate import large, mutants, seeds
from faults.report import Row
from faults.served import config, serve

SLOWEST_S = 20.0
_ROUGHLY = 1.05  # what a decoder reserves is an estimate
MOST_MEMORY = 1_000  # MB: 64 megapixels at 4 bytes, the copies that converting and turning make, and the libraries
KEPT = Path("build/fuzz")


def decoder(count: int, seed: int) -> Row:
    """Files through images.py in a process that may die of them."""
    spec = find_checkpoint("tiny").pixels
    process = DecodeProcess(spec)
    pixels = np.zeros((*spec.size, 3), np.uint8)
    outcomes: Counter[str] = Counter()
    slowest = memory = 0.0
    for number, content in enumerate(itertools.islice(mutants(seed), count)):
        began = time.monotonic()
        reply = process.decode_into(content, pixels, timeout_s=SLOWEST_S, tries=1)
        slowest = max(slowest, time.monotonic() - began)
        outcomes[reply.code if isinstance(reply, ClipfleetError) else "decoded"] += 1
        if isinstance(reply, ImageCrashedDecoder):
            _keep(content, f"crash-{seed}-{number}")
        elif process._process is not None:
            peak = _peak(process._process.pid)
            if peak > memory and peak > MOST_MEMORY:
                _keep(content, f"memory-{seed}-{number}")
            memory = max(memory, peak)
        if number % 2000 == 1999:
            print(
                f"{number + 1} files: {dict(outcomes.most_common())}, slowest {slowest:.1f} s, {memory:.0f} MB",
                flush=True,
            )
    process.close()
    kept = not outcomes["image_crashed_decoder"] and memory <= MOST_MEMORY
    listed = ", ".join(f"{what} {times}" for what, times in outcomes.most_common())
    return Row(
        f"damaged files through the decoder, seed {seed}", "one process", count,
        f"{listed}; slowest {slowest:.1f} s, peak memory {memory:.0f} MB", kept,
    )  # fmt: skip


def large_files() -> Row:
    """Files as large as they may be, each in a process of its own: none takes more than a decoder reserves for it."""
    spec = find_checkpoint("tiny").pixels
    pixels = np.zeros((*spec.size, 3), np.uint8)
    outcomes: Counter[str] = Counter()
    over = []
    slowest = most = 0.0
    for name, content in large():
        process = DecodeProcess(spec)
        process.decode_into(seeds()[0], pixels)
        assert process._process is not None
        before, began = _peak(process._process.pid), time.monotonic()
        reply = process.decode_into(content, pixels, timeout_s=SLOWEST_S, tries=1)
        seconds = time.monotonic() - began
        outcome = reply.code if isinstance(reply, ClipfleetError) else "decoded"
        taken = 0.0 if process._process is None else _peak(process._process.pid) - before
        process.close()
        reserved = decoding_bytes(open_image(content), spec) / 2**20
        print(f"{name}: {outcome} in {seconds:.1f} s, {taken:.0f} MB, {reserved:.0f} reserved", flush=True)
        outcomes[outcome] += 1
        slowest, most = max(slowest, seconds), max(most, taken / reserved)
        if outcome == "image_crashed_decoder" or taken > _ROUGHLY * reserved:
            over.append(name)
    listed = ", ".join(f"{what} {times}" for what, times in outcomes.most_common())
    return Row(
        "files of 64 megapixels through the decoder", "one process each", outcomes.total(),
        f"{listed}; slowest {slowest:.1f} s; at most {most:.0%} of the memory reserved{'; over: ' if over else ''}"
        f"{', '.join(over)}", not over,
    )  # fmt: skip


def service(count: int, seed: int) -> Row:
    """The same kind of files over HTTP: raw, as multipart and as base64 in JSON."""
    statuses: Counter[int | str] = Counter()
    slowest = 0.0
    with serve(config({}), "tiny") as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        for number, content in enumerate(itertools.islice(mutants(seed), count)):
            path, headers, body = _request(content, number)
            began = time.monotonic()
            try:
                connection.request("POST", path, body, headers)
                answer = connection.getresponse()
                answer.read()
                status: int | str = answer.status
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                connection.close()
            slowest = max(slowest, time.monotonic() - began)
            statuses[status] += 1
            if not isinstance(status, int) or status >= 500:
                _keep(content, f"http-{seed}-{number}")
            if number % 1000 == 999:
                print(f"{number + 1} requests: {dict(statuses)}, slowest {slowest:.1f} s", flush=True)
        connection.close()
        alive = served.ready()
    bad = sum(times for status, times in statuses.items() if not isinstance(status, int) or status >= 500)
    listed = ", ".join(f"{status} {times}" for status, times in statuses.most_common())
    return Row(
        f"damaged files over HTTP, seed {seed}", "one client", count,
        f"{listed}; slowest {slowest:.1f} s; /readyz {'200' if alive else 'not 200'} afterwards", alive and not bad,
    )  # fmt: skip


def _request(content: bytes, number: int) -> tuple[str, dict[str, str], bytes]:
    if number % 3 == 0:
        return "/v1/embeddings/images", {"Content-Type": "application/octet-stream"}, content
    if number % 3 == 1:
        head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=cut"}
        return "/v1/embeddings/images?on_error=partial", kind, head + content + b"\r\n--cut--\r\n"
    body = json.dumps({"input": [{"image": base64.b64encode(content).decode()}]}).encode()
    return "/v1/embeddings", {"Content-Type": "application/json"}, body


def _peak(pid: int) -> float:
    """The largest memory that a process ever had, in MB."""
    for line in Path("/proc", str(pid), "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _keep(content: bytes, name: str) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / name).write_bytes(content)
    print(f"kept as {KEPT / name}", flush=True)


def measure(files: int, requests: int, seed: int) -> list[Row]:
    return [large_files(), decoder(files, seed), service(requests, seed + 1)]
