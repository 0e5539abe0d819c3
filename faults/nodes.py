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
from faults.served import ROOT, config, serve
from faults.traffic import traffic

NODE_CPUS = 2
DEPLOYMENTS = ("Ingress", "ImageDecoder", "ImageEncoder", "TextEncoder")
_NODE = """
import signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
Node(
    RayParams(gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=int(sys.argv[2]), object_store_memory=2**27),
    head=False, shutdown_at_exit=False, spawn_reaper=False,
)
signal.pause()
"""


@contextmanager
def second_node(service: int) -> Iterator[int]:
    """Another raylet on this machine that joins the Ray of the `clipfleet serve` with this process id; yields the process id
    of what started it."""
    titles = {pid: Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ") for pid in below(service)}
    ((raylet, title),) = [item for item in titles.items() if item[1].split(" ")[0].endswith("raylet")]
    address = re.search(r"--gcs-address=(\S+)", title)
    assert address, title
    # What the service's own Ray runs under: its folder, its token, and how Serve is set.
    entries = Path("/proc", str(raylet), "environ").read_text().split("\0")
    variables = {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}
    command = [sys.executable, "-c", _NODE, address[1], str(NODE_CPUS)]  # `ray start` joins no Ray on loopback
    node = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    """Two nodes with a replica of each deployment, of which one is killed: the other goes on, and a third takes its place."""
    shown = pictures("tiny")
    both = config(dict.fromkeys(DEPLOYMENTS, 2))
    for deployment in both["applications"][0]["deployments"]:
        deployment["max_replicas_per_node"] = 1
    with serve(config({}), "tiny") as served:
        with second_node(served.pid) as node:
            time.sleep(5)
            print(served.reload(both), flush=True)
            theirs = [name for name in below(node).values() if name in DEPLOYMENTS]
            (raylet,) = [pid for pid, name in below(node).items() if name == "raylet"]
            with traffic(served.port, shown, CLIENTS) as seen:
                time.sleep(5)
                print(f"{time.strftime('%T')} kill -9 {raylet} (raylet, with {', '.join(theirs)})", flush=True)
                os.kill(raylet, signal.SIGKILL)
                time.sleep(40)
        with second_node(served.pid) as another:
            end = time.monotonic() + 120
            while set(DEPLOYMENTS) - set(below(another).values()) and time.monotonic() < end:
                time.sleep(1)
            back = sorted(set(DEPLOYMENTS) & set(below(another).values()))
            served.until_ready()
    row = row_of(f"`kill -9` of the raylet of a second node with {len(theirs)} replicas, tiny", 1, seen)
    kept = row.kept and len(theirs) == len(back) == len(DEPLOYMENTS)
    return [replace(row, outcome=f"{row.outcome}; came back on a third node: {', '.join(back) or 'none'}", kept=kept)]
