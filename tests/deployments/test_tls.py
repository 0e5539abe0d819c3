"""HTTPS with the user's own certificate, and a public address that was asked for twice."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.deployments.processes import of_folder, private_folder, until
from tests.deployments.service import BIN, ROOT, free_ports, running

CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"  # its own issuer, for localhost and 127.0.0.1


def test_https_on_a_public_address_until_the_command_is_killed(tmp_path: Path) -> None:
    port, metrics_port = free_ports(2)
    file = tmp_path / "my certificate.pem"
    file.write_bytes(CERTIFICATE.read_bytes())
    options = ("--host", "0.0.0.0", "--open", "--tls", file, "--port", port, "--metrics-port", metrics_port)
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "serve", "demo", *map(str, options), folder=folder) as command,
    ):
        command.wait_for("clipfleet ready: ")
        assert f"https://0.0.0.0:{port}" in command.out
        trusted = ssl.create_default_context(cafile=CERTIFICATE)
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False, timeout=60) as client:
            answer = client.post("/v1/embeddings", json={"input": "a red circle"}).raise_for_status()
            assert np.linalg.norm(answer.json()["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=10).raise_for_status()
        assert len(of_folder(folder)) > 5
        command.send(signal.SIGKILL)
        until(lambda: not of_folder(folder), 30, "an end of all its processes")
        until(lambda: not any(path for path in folder.rglob("*") if path.is_file()), 30, "an end of all its files")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_is_no_certificate(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tls.pem"
    if content is not None:
        file.write_text(content)
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "serve", "demo", "--tls", str(file), folder=folder) as command,
    ):
        assert command.wait(60) == 1
        assert "tls.pem" in command.err and "certificate" in command.err
