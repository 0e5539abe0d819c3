"""How HAProxy's generated file is edited."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.haproxy_wrapper import (
    BUFFER_BYTES,
    HEALTH_PATHS,
    edit,
    edit_file,
    missing_lines,
    most_in_use,
    with_buffers,
    with_servers,
)

SERVER = "    server SERVE_REPLICA_clipfleet-Ingress-{} 127.0.0.1:{} check observe layer4\n"


@pytest.mark.parametrize(("replicas", "kept"), [(0, 2**20), (1, 2**20), (2, BUFFER_BYTES), (3, BUFFER_BYTES)])
def test_the_buffer_by_the_number_of_ingress_replicas(replicas: int, kept: int, tmp_path: Path) -> None:
    generated = f"global\n    tune.bufsize {BUFFER_BYTES}\nbackend http-clipfleet\n"
    generated += "".join(SERVER.format(number, 20000 + number) for number in range(replicas))
    generated += "    # Fallback to head node's Serve proxy\n    server fallback 127.0.0.1:20100 backup\n"
    edited = with_buffers(edit(generated, tmp_path, "127.0.0.1", "8000"))
    assert f"    tune.bufsize {kept}\n" in edited
    assert "backup" not in edited
    assert with_buffers(edit(edited, tmp_path, "127.0.0.1", "8000")) == edited


def test_servers_that_serve_leaves_out_for_a_moment_stay(tmp_path: Path) -> None:
    head = f"global\n    tune.bufsize {BUFFER_BYTES}\n"
    servers = "".join(SERVER.format(number, 20000 + number) for number in range(2))
    file = tmp_path / "haproxy.cfg"
    contents = []
    for backends in (
        f"backend http-clipfleet\n{servers}",
        "",  # the first file of a new manager
        f"backend http-clipfleet\nbackend http-clipfleet_next\n{SERVER.format(2, 20002)}",
        "backend http-clipfleet_next\n",
    ):
        file.write_text(head + backends)
        edit_file(file, "127.0.0.1", "8000", "")
        contents.append(file.read_text())
    assert contents[0].count("    server ") == 2
    assert "    server " not in contents[1]
    assert servers in contents[2] and f"    tune.bufsize {BUFFER_BYTES}\n" in contents[2]
    assert contents[3].count("    server ") == 1 and ":20002 " in contents[3]
    _, known = with_servers(contents[3], {"http-clipfleet": servers})
    assert list(known) == ["http-clipfleet_next"]  # a name that comes back has other replicas


def test_requests_are_refused_before_connections_run_out(tmp_path: Path) -> None:
    head = f"global\n    tune.bufsize {BUFFER_BYTES}\n"
    generated = f"{head}frontend http_frontend\n    use_backend http-clipfleet if is_http-clipfleet\n"
    edited = edit(generated, tmp_path, "127.0.0.1", "8000")
    *rules, use = edited.splitlines()[-4:]
    most = most_in_use(BUFFER_BYTES)
    refuse = f"    http-request return status 429 errorfile {tmp_path}/429.http if {{ be_conn(http-clipfleet) ge "
    assert rules == [
        f"{refuse}{most * 5 // 8} }} {{ path_end /v1/embeddings/images }}",
        f"{refuse}{most * 5 // 8} }} {{ method POST }} !{{ req.hdr_val(content-length) 0:65536 }}",
        f"{refuse}{most * 3 // 4} }} !{{ path_end {' '.join(HEALTH_PATHS)} }}",
    ], "images leave room for texts, and all of them for those that are refused"
    assert f"    tune.buffers.limit {2 * most}" in edited.splitlines()
    assert use == "    use_backend http-clipfleet if is_http-clipfleet"
    assert edit(edited, tmp_path, "127.0.0.1", "8000") == edited
    small = with_buffers(edited)
    assert edit(small, tmp_path, "127.0.0.1", "8000") == small, "HAProxy may start anew with the file that is there"


def test_a_template_that_is_not_ours() -> None:
    assert missing_lines(HAPROXY_CONFIG_TEMPLATE) == []
    other = HAPROXY_CONFIG_TEMPLATE.replace("    option splice-response\n", "")
    assert [line.splitlines()[0] for line in missing_lines(other)] == ["    option splice-request"]
