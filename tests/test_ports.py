"""Ports: one that is taken or claimed is refused, and a claim ends with its socket."""

from __future__ import annotations

import socket

import pytest

from clipfleet.errors import SetupError
from clipfleet.ports import claim_port


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_port_that_somebody_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port}: Address already in use.*--metrics-port"):
            claim_port("127.0.0.1", port, "--metrics-port")


def test_a_claim_keeps_others_away_until_it_is_closed() -> None:
    port = free_port()
    with claim_port("127.0.0.1", port, "--port"), pytest.raises(SetupError, match="--port"):
        claim_port("127.0.0.1", port, "--port")
    claim_port("127.0.0.1", port, "--port").close()


def test_an_address_that_this_machine_has_not() -> None:
    with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1"):
        claim_port("192.0.2.1", free_port(), "--port")
