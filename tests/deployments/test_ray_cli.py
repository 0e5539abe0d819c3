"""For those who know Ray: `serve run`, `serve deploy` and a new user_config, on a cluster that they started themselves."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deployments.processes import end_all, of_folder, private_folder, until
from tests.deployments.service import BIN, ROOT, free_ports, running, sum_of

SECONDS = 180  # only guards against a hang
QUICK = {"RAY_metrics_report_interval_ms": "1000", "RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True)
class Cluster:
    """A cluster of one node, as `ray start --head` makes it."""

    folder: Path
    address: str
    dashboard: str
    metrics: str

    @property
    def variables(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_USAGE_STATS_ENABLED": "0",
            **QUICK,
        }

    def replicas(self) -> dict[int, str]:
        """The replicas' process ids and titles."""
        titles = {process.pid: process.title.partition("#")[0] for process in of_folder(self.folder)}
        return {pid: title for pid, title in titles.items() if title.startswith("ray::ServeReplica:clipfleet:")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with private_folder() as folder:
        (folder / "run").mkdir()  # TMPDIR of commands that join the cluster, and of none that belong to it
        port, dashboard, metrics, client, agent = free_ports(5)
        command = [
            BIN / "ray", "start", "--head", "--port", str(port), "--dashboard-port", str(dashboard),
            "--metrics-export-port", str(metrics), "--dashboard-agent-listen-port", str(agent),
            "--min-worker-port", "0", "--max-worker-port", "0", "--ray-client-server-port", str(client),
            "--temp-dir", folder / "ray", "--num-cpus", "2", "--object-store-memory", str(256 * 2**20),
            "--disable-usage-stats", "--include-dashboard", "true",
        ]  # fmt: skip
        try:
            with running(*command, folder=folder, **QUICK) as started:
                # Its daemons hold the pipes open, so its end alone is waited for, not theirs.
                until(lambda: started.ended, SECONDS, "ray start")
                assert "Ray runtime started" in started.out, started.err
                yield Cluster(
                    folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}"
                )
        finally:
            end_all(folder)
            until(lambda: not of_folder(folder), 30, "an end of the cluster")
            for left in folder.iterdir():  # what killed processes cannot remove themselves
                shutil.rmtree(left, ignore_errors=True)


def config(tmp_path: Path, port: int, **encoder: Any) -> Path:
    """configs/demo.yaml on another port, with more in the entry of ImageEncoder."""
    content = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    content["http_options"]["port"] = port
    next(d for d in content["applications"][0]["deployments"] if d["name"] == "ImageEncoder").update(encoder)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_serve_run(cluster: Cluster, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    variables = cluster.variables
    with running(BIN / "serve", "run", config(tmp_path, port), folder=cluster.folder / "run", **variables) as command:
        until(lambda: ready(port) or command.ended, SECONDS, "the application")
        url = f"http://127.0.0.1:{port}/v1/embeddings"
        answer = httpx.post(url, json={"input": "a red circle"}, timeout=60, trust_env=False)
        assert len(answer.json()["data"][0]["embedding"]) == 512
        command.send(signal.SIGINT)
        command.wait(90)
    until(lambda: not cluster.replicas(), 60, "an end of the replicas")


def test_serve_run_refuses_what_contradicts_itself(cluster: Cluster, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    file = config(tmp_path, port, max_ongoing_requests=16, user_config={"max_batch_size": 32})
    with running(BIN / "serve", "run", file, folder=cluster.folder / "run", **cluster.variables) as command:
        command.wait_for("max_ongoing_requests 16 is below max_batch_size 32")
        command.send(signal.SIGINT)
        command.wait(90)
    until(lambda: not cluster.replicas(), 60, "an end of the replicas")


def test_deploy_and_a_new_batch_size_without_a_restart(cluster: Cluster, tmp_path: Path, files: list[bytes]) -> None:
    (port,) = free_ports(1)

    def deploy(size: int) -> None:
        file = config(tmp_path, port, user_config={"max_batch_size": size, "batch_wait_timeout_s": 0})
        command = [str(BIN / "serve"), "deploy", str(file), "--address", cluster.dashboard]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=SECONDS)

    sent = 0

    def batches() -> float:
        """How many batches twelve images of one request make, once they have arrived in the metrics."""
        nonlocal sent

        def read(name: str) -> float:
            page = httpx.get(f"{cluster.metrics}/metrics", timeout=30, trust_env=False).text
            return sum_of(page, f"ray_clipfleet_{name}", tower="image")

        before = read("batch_size_count")
        uploads = [("files", (f"{number}.png", data)) for number, data in enumerate(files)]
        url = f"http://127.0.0.1:{port}/v1/embeddings/images"
        assert httpx.post(url, files=uploads, timeout=60, trust_env=False).status_code == 200
        sent += len(files)
        until(lambda: read("items_total") == sent and read("queue_wait_seconds_count") == sent, 60, "the metrics")
        return read("batch_size_count") - before

    deploy(1)
    until(lambda: ready(port), SECONDS, "the application")
    replicas = cluster.replicas()
    assert len(replicas) == 4
    assert batches() == len(files)

    deploy(16)
    until(lambda: batches() < len(files), 60, "larger batches")
    assert cluster.replicas() == replicas
