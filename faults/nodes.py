"""A second node of the cluster that dies under load."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.processes import below
from faults.chaos import CLIENTS, pictures, row_of
from faults.report import Row
from faults.served import Served, config, serve
from faults.traffic import traffic

NODE_CPUS = 2


@contextmanager
def second_node(served: Served) -> Iterator[int]:
    """Another raylet on this machine that joins the service's Ray; yields the process id of its `ray start`."""
    titles = {pid: Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ") for pid in served.processes()}
    ((raylet, title),) = [item for item in titles.items() if item[1].split(" ")[0].endswith("raylet")]
    address = re.search(r"--gcs-address=(\S+)", title)
    assert address, title
    # What the service's own Ray runs under: its folder, its token, and how Serve is set.
    variables = dict(
        entry.partition("=")[::2] for entry in Path("/proc", str(raylet), "environ").read_text().split("\0") if entry
    )
    variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # which the service's Ray sets to 0, to stay on loopback
    command = [Path(sys.executable).parent / "ray", "start", "--address", address[1], "--block",
               "--node-ip-address", "127.0.0.1", "--num-cpus", str(NODE_CPUS)]  # fmt: skip
    node = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield node.pid
    finally:
        left = below(node.pid)
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            node.kill()
        for pid in left:
            if pid != node.pid and Path("/proc", str(pid)).exists():
                os.kill(pid, signal.SIGKILL)


def dying_node() -> list[Row]:
    """Replicas on two nodes, of which one is killed: the others go on, and the lost ones come back on what is left."""
    shown = pictures("tiny")
    replicas = {"Ingress": 2, "ImageDecoder": 3, "ImageEncoder": 3}
    with serve(config({}), "tiny") as served, second_node(served) as node:
        time.sleep(5)
        served.reload(config(replicas))
        theirs = [pid for pid, name in below(node).items() if name in replicas]
        (raylet,) = [pid for pid, name in below(node).items() if name == "raylet"]
        with traffic(served.port, shown, CLIENTS) as seen:
            time.sleep(5)
            print(f"{time.strftime('%T')} kill -9 {raylet} (raylet, with {len(theirs)} replicas)", flush=True)
            os.kill(raylet, signal.SIGKILL)
            time.sleep(60)
        back = {name: len(served.replicas(name)) for name in replicas}
        served.until_ready()
    row = row_of(f"`kill -9` of the raylet of a second node with {len(theirs)} replicas, tiny", 1, seen)
    kept = row.kept and bool(theirs) and back == replicas
    return [replace(row, outcome=f"{row.outcome}; replicas a minute later: {back}", kept=kept)]
