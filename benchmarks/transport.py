"""Transport alone: the real ingress with a decoder and an encoder that do nothing, against a plain three-hop graph under Ray
Serve's defaults. Bodies of 100 kB, 16 clients, the load generator on the same cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import stop
from benchmarks.programs import Spread, ratio
from benchmarks.report import Row
from clipfleet.load import Load, Request, run_load

CLIENTS, BODY, REQUESTS = 16, 100_000, 1000
_OURS = (
    "from deployments.transport import measure_transport; "
    f"print('rate', measure_transport(clients={CLIENTS}, body_bytes={BODY}, requests={REQUESTS}).rate)"
)


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(_ours())
        theirs.append(_plain().rate)
        print(f"transport: {ours[-1]:.0f}/s, plain graph {theirs[-1]:.0f}/s", flush=True)
    a, b = Spread.of(ours), Spread.of(theirs)
    return [Row("transport alone, 100 kB, 16 clients", a, "/s", "a plain graph, Serve's defaults", b, ratio(a, b), 4)]


def _ours() -> float:
    done = subprocess.run([sys.executable, "-c", _OURS], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"transport could not be measured: {done.stderr[-2000:]}")
    return float(done.stdout.split("rate")[-1])


def _plain() -> Load:
    with _plain_graph() as url:
        request = Request("/", {"Content-Type": "application/octet-stream"}, bytes(BODY))
        run_load(url, [request] * 200, CLIENTS)
        return run_load(url, [request] * REQUESTS, CLIENTS)


@contextmanager
def _plain_graph() -> Iterator[str]:
    port = 8899
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        config = Path(folder, "config.yaml")
        config.write_text(
            f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
            "applications: [{name: plain, route_prefix: /, import_path: 'benchmarks.peers.plain_graph:app'}]\n"
        )
        serve = Path(sys.executable).parent / "serve"
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd(), "RAY_ADDRESS": "local"}
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [serve, "run", config], env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                _wait(f"http://127.0.0.1:{port}", process)
                yield f"http://127.0.0.1:{port}"
            finally:
                stop(process)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    request = Request("/", {}, b"x")
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if not run_load(url, [request], 1).failures:
                return
        except Exception:  # not there yet
            time.sleep(0.5)
    raise RuntimeError("the plain graph did not start")
