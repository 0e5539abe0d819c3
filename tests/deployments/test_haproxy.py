"""How HAProxy's generated file is edited: a request is kept to be sent again where there is another replica to send it to."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.haproxy_wrapper import BUFFER_BYTES, edit

SERVER = "    server SERVE_REPLICA_clipfleet-Ingress-{} 127.0.0.1:{} check observe layer4\n"


@pytest.mark.parametrize(("replicas", "kept"), [(0, 2**20), (1, 2**20), (2, 4 * 2**20), (3, 4 * 2**20)])
def test_the_buffer_by_the_number_of_ingress_replicas(replicas: int, kept: int, tmp_path: Path) -> None:
    generated = f"global\n    tune.bufsize {BUFFER_BYTES}\nbackend http-clipfleet\n"
    generated += "".join(SERVER.format(number, 20000 + number) for number in range(replicas))
    generated += "    # Fallback to head node's Serve proxy\n    server fallback 127.0.0.1:20100 backup\n"
    edited = edit(generated, tmp_path, "127.0.0.1", "8000")
    assert f"    tune.bufsize {kept}\n" in edited
    assert "backup" not in edited
    assert edit(edited, tmp_path, "127.0.0.1", "8000") == edited
