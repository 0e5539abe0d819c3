"""`clipfleet serve` from start to end: refusals before Ray starts, what it listens on, signals, kills, and nothing left."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.chaos import leave
from tests.deployments.processes import Process, of_folder, private_folder, until
from tests.deployments.service import BIN, ROOT, Service, free_ports, running


def refused(*arguments: str | Path, **variables: Any) -> str:
    """Run `clipfleet serve`, which must end with status 1, one line on stderr and nothing left; returns the line."""
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "serve", *arguments, folder=folder, **variables) as command,
    ):
        assert command.wait(60) == 1
        assert command.out == "" and command.err.startswith("clipfleet: ") and command.err.count("\n") == 1
        return command.err


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline"])
def test_a_checkpoint_that_cannot_be_had(tmp_path: Path, variables: dict[str, str]) -> None:
    # A proxy that refuses every connection stands for the missing network.
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    line = refused("--model", "openai/clip-vit-base-patch32", **nowhere, **variables)
    assert "'openai/clip-vit-base-patch32'" in line and "--model tiny" in line


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    line = refused("--model", tmp_path)
    assert str(tmp_path) in line and "config.json" in line


def changed(tmp_path: Path, **deployment: Any) -> Path:
    """configs/demo.yaml with more in the ImageEncoder's entry."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    next(d for d in config["applications"][0]["deployments"] if d["name"] == "ImageEncoder").update(deployment)
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_without_keys(host: str) -> None:
    line = refused("demo", "--host", host)
    assert host in line and "clipfleet keys add" in line and "--open" in line


def test_keys_of_the_shell_do_not_reach_a_cluster() -> None:
    line = refused("demo", "--host", "0.0.0.0", RAY_ADDRESS="127.0.0.1:9", CLIPFLEET_API_KEYS="of-the-shell")
    assert "0.0.0.0" in line and "args.api_keys_file" in line and "--open" in line


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    line = refused(changed(tmp_path, max_ongoing_requests=16, user_config={"max_batch_size": 32}))
    assert "max_ongoing_requests 16" in line and "max_batch_size 32" in line


def test_a_setting_that_serve_does_not_know(tmp_path: Path) -> None:
    line = refused(changed(tmp_path, num_replica=2))
    assert "num_replica" in line


def test_an_index_that_cannot_be_searched(tmp_path: Path) -> None:
    line = refused("demo", "--index", tmp_path)
    assert str(tmp_path) in line and "clipfleet index" in line
    (tmp_path / "meta.json").write_text("{}")
    two = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    two["applications"][0]["deployments"][0]["num_replicas"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    line = refused(tmp_path / "two.yaml", "--index", tmp_path)
    assert "args.search.qdrant is a folder" in line and "Ingress" in line


def test_a_config_file_that_is_not_there() -> None:
    line = refused("nothing.yaml")
    assert "'nothing.yaml'" in line and "demo" in line


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_that_is_taken(option: str) -> None:
    port, other = free_ports(2)
    rest = "--metrics-port" if option == "--port" else "--port"
    with socket.create_server(("127.0.0.1", port)):
        line = refused("demo", option, str(port), rest, str(other))
    assert f"127.0.0.1:{port}" in line and option in line


def _sockets(processes: list[Process]) -> set[str]:
    """The inodes of the processes' sockets."""
    found = set()
    for process in processes:
        for link in Path("/proc", str(process.pid), "fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _listening(processes: list[Process]) -> set[str]:
    """The addresses that the processes listen on, as /proc/net writes them."""
    own = _sockets(processes)
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/net", kind).read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in own}


def test_it_listens_on_loopback_alone(service: Service) -> None:
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}  # IPv4, IPv6, IPv4 in IPv6
    addresses = _listening(service.processes())
    assert addresses and addresses <= loopback


def test_its_port_is_taken_for_a_second_one(service: Service) -> None:
    (other,) = free_ports(1)
    assert f":{service.port}" in refused("demo", "--port", str(service.port), "--metrics-port", str(other))


def _load(
    service: Service, stop: threading.Event, answers: list[int | str], path: str, request: dict[str, Any]
) -> None:
    with service.client() as http:
        while not stop.is_set():
            # Texts that no cache has.
            texts = [f"{random.random()} of many words" for _ in range(request.get("input", 0))]
            try:
                answers.append(http.post(path, **({"json": {"input": texts}} if texts else request)).status_code)
            except Exception as error:
                answers.append(repr(error))


@pytest.mark.parametrize(("deployment", "items"), [("ImageDecoder", 1), ("ImageEncoder", 16), ("TextEncoder", 400)])
def test_a_killed_replica_fails_no_request(service: Service, files: list[bytes], deployment: str, items: int) -> None:
    """Nor one of many items, all of which the replica had in hand."""
    stop = threading.Event()
    answers: list[int | str] = []
    path: str = "/v1/embeddings/images"
    requests: list[dict[str, Any]] = [{"files": [("files", ("a", body))] * items} for body in files[:8]]
    if deployment == "TextEncoder":
        path, requests = "/v1/embeddings", [{"input": items}] * 8
    clients = [threading.Thread(target=_load, args=(service, stop, answers, path, request)) for request in requests]
    for thread in clients:
        thread.start()
    try:
        until(lambda: len(answers) > (40 if items == 1 else 4), 60, "answers before the kill")
        (victim,) = service.replicas(deployment)
        os.kill(victim.pid, signal.SIGKILL)
        so_far = len(answers)
        until(lambda: len(answers) > so_far + (100 if items == 1 else 16), 90, "answers after the kill")
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert set(answers) == {200}
    (successor,) = service.replicas(deployment)
    assert successor.pid != victim.pid


def test_clients_that_leave_and_idle_connections_stop_nobody(service: Service, files: list[bytes]) -> None:
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(1500)]
    try:
        for connection in idle[:100]:  # these take a buffer each
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\n")
        for number in range(60):
            leave(service.port, files[number % 12], ("upload", "queue", "work")[number % 3])
        with service.client() as http:
            assert {http.post("/v1/embeddings", json={"input": f"idle {n}"}).status_code for n in range(20)} == {200}
    finally:
        for connection in idle:
            connection.close()


def test_a_ray_that_does_not_stop_keeps_no_command_alive() -> None:
    code = (
        "import time, ray; from deployments import deploying; ray.shutdown = lambda: time.sleep(600); "
        "deploying.DRAIN_S = deploying.STOP_S = 1; deploying.stop(())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "clipfleet: Ray did not stop within 2 s; it was killed\n")


@pytest.mark.parametrize("process", ["gcs_server", "ServeController"])
def test_sigterm_during_the_start(process: str) -> None:
    with private_folder() as folder:
        port, metrics_port = free_ports(2)
        ports = ("--port", str(port), "--metrics-port", str(metrics_port))
        with running(BIN / "clipfleet", "serve", "demo", *ports, folder=folder) as command:
            until(lambda: any(process in found.title for found in of_folder(folder)), 60, "a start of Ray")
            command.send(signal.SIGTERM)
            assert command.wait(60) == 0 and "Traceback" not in command.err
