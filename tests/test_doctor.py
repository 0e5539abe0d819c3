"""`clipfleet doctor`: what it looks at, and what it says of what does not fit."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from clipfleet.ports import claim_port
from clipfleet.qdrant import Collection
from tests.deployments.listener import in_thread
from tests.test_cli import run

TINY = fingerprint(find_checkpoint("tiny"))


def examine(*arguments: str | Path, status: int = 0, **variables: str) -> dict[str, tuple[str, str]]:
    """(state, what was said) of each subject, the last one where it has several."""
    done = run("doctor", "--json", *arguments, **variables)
    assert done.returncode == status, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {each["about"]: (each["state"], each["said"]) for each in found}


def config(folder: Path, *, http_options: dict[str, object] | None = None, **search: str) -> Path:
    """A config file whose service searches there."""
    file = folder / "mine.yaml"
    arguments = {"model": "tiny", **({"search": search} if search else {})}
    application = {"name": "clipfleet", "import_path": "deployments.graph:build", "args": arguments}
    file.write_text(yaml.safe_dump({"http_options": http_options or {}, "applications": [application]}))
    return file


def test_this_machine() -> None:
    found = examine("demo")
    assert found["machine"][1].startswith("Python 3.") and "core" in found["machine"][1]
    assert "torch 2" in found["[local]"][1] and "ray 2.60" in found["[serve]"][1]
    assert found["config"] == ("good", "demo: every setting is known, and none contradicts another")
    assert found["checkpoint"][1].endswith(f"fingerprint {TINY}")
    assert found["engine"][1].startswith("openvino on cpu in float32: device cpu was asked for; openvino is installed")


def test_for_people_each_line_has_its_mark(tmp_path: Path) -> None:
    done = run("doctor", "--model", "tiny", "--dest", tmp_path)
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("! ")] == [
        f"! DEST: {str(tmp_path)!r} holds no rows of a job"
    ]
    assert "  checkpoint: tiny: clip in " in done.stdout


def test_what_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("applications: [{name: clipfleet, import_path: 'deployments.graph:build', args: {limit: 3}}]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = examine(file, "--port", str(port), "--precision", "int8", "--engine", "torch", status=1)
    assert found["config"][0] == "problem"
    file.write_text("applications: [{name: clipfleet, import_path: 'deployments.graph:build'}]")
    default = examine(file, status=1, HF_HOME=str(tmp_path))
    assert default["config"][0] == "good" and "openai/clip-vit-base-patch32" in default["checkpoint"][1]
    assert found["engine"] == ("problem", "precision int8 runs on CPUs by engine openvino, not on cpu by engine torch")
    taken_port = examine("--model", "nobody/nothing", "--dest", tmp_path, status=1, HF_HOME=str(tmp_path))
    assert taken_port["checkpoint"] == (
        "problem",
        "checkpoint 'nobody/nothing' is not in the local hub cache; the first use downloads it",
    )


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = run("doctor", "--port", str(port))
    assert found.returncode == 1
    assert f"! port: cannot listen on 127.0.0.1:{port}: Address already in use" in found.stdout
    assert "Choose another with --port" in found.stdout


def test_the_port_of_a_service_that_starts_and_does_not_listen_yet(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = config(tmp_path, http_options={"host": "127.0.0.2", "port": port})
    with claim_port("127.0.0.1", port, "--port"):
        found = run("doctor", file)
    assert found.returncode == 1 and f"! port: cannot listen on 127.0.0.2:{port}: " in found.stdout


@pytest.mark.parametrize(("made_by", "status"), [(TINY, 0), ("f00d", 1), (None, 1)])
def test_a_job_output(made_by: str | None, status: int, tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"]})
    if made_by:
        table = table.replace_schema_metadata({"clipfleet.fingerprint": made_by, "clipfleet.model": "other/model"})
    pq.write_table(table, tmp_path / "part-00000.parquet")
    state, said = examine("--model", "tiny", "--dest", tmp_path, status=status)["DEST"]
    assert state == ("problem" if status else "good")
    assert {TINY: "2 rows by this very checkpoint", "f00d": "other/model with fingerprint f00d", None: "not written"}[
        made_by
    ] in said


def test_a_job_output_that_is_cut(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    state, said = examine("--model", "tiny", "--dest", tmp_path, status=1)["DEST"]
    assert state == "problem" and "part-00000.parquet" in said


def test_a_collection(tmp_path: Path) -> None:
    place = tmp_path / "qdrant"
    asked = ("--model", "tiny", "--qdrant", place, "--collection", "mine")
    state, said = examine(*asked, status=1)["collection"]
    assert state == "problem" and said.startswith(f"{str(place)!r} is no index")
    assert not place.exists()
    for name, made_by in (("mine", TINY), ("theirs", "f00d")):
        with Collection(str(place), name).opened() as points:
            points.prepare(512, made_by)
    assert examine(*asked)["collection"][1] == f"mine at {place}: by this very checkpoint; keep it"
    assert "f00d" in examine(*asked[:-1], "theirs", status=1)["collection"][1]
    assert "there is no collection" in examine(*asked[:-1], "nobodys", status=1)["collection"][1]
    assert "--model" in examine(*asked[2:], status=1)["index"][1]


def test_the_collection_that_a_config_file_searches(tmp_path: Path) -> None:
    place = tmp_path / "index" / "qdrant"
    for name, made_by in (("images", TINY), ("theirs", "f00d")):
        with Collection(str(place), name).opened() as points:
            points.prepare(512, made_by)
    index = str(tmp_path / "index")
    good = ("good", f"images at {place}: by this very checkpoint; keep it")
    assert examine(config(tmp_path, qdrant=index))["collection"] == good
    assert examine(config(tmp_path, qdrant=index, collection="theirs"), "--collection", "images")["collection"] == good
    for name, words in (("theirs", "f00d"), ("nobodys", "there is no collection 'nobodys'")):
        state, said = examine(config(tmp_path, qdrant=index, collection=name), status=1)["collection"]
        assert state == "problem" and words in said
    away = config(tmp_path, qdrant="http://127.0.0.1:9")
    assert examine(away, "--qdrant", place, "--collection", "images")["collection"] == good
    nothing = examine(config(tmp_path, qdrant=str(tmp_path / "nothing")), status=1)["config"]
    assert nothing[0] == "problem" and nothing[1].startswith(f"{str(tmp_path / 'nothing')!r} is no index")


def test_a_folder_that_a_running_service_has_open(tmp_path: Path) -> None:
    with Collection(str(tmp_path), "images").opened() as points:
        points.prepare(512, TINY)
        assert examine(config(tmp_path, qdrant=str(tmp_path)))["collection"][0] == "good"


class Locked(BaseHTTPRequestHandler):
    """A Qdrant server that wants a key and has no collections."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        may = self.headers.get("api-key") == "the-right-one"
        content = b'{"time": 0, "status": "ok", "result": {"exists": false}}' if may else b"{}"
        self.send_response(200 if may else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_a_server_that_wants_a_key_or_is_away(tmp_path: Path) -> None:
    with in_thread(ThreadingHTTPServer(("127.0.0.1", 0), Locked)) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        keyed = config(tmp_path, qdrant=url, qdrant_api_key="the-right-one")
        by_file = examine(keyed, status=1, QDRANT_API_KEY="another")["collection"]
        by_environment = examine(config(tmp_path, qdrant=url), status=1, QDRANT_API_KEY="the-right-one")["collection"]
        assert by_file == by_environment == ("problem", f"there is no collection 'images' at {url!r}")
        refused = examine(config(tmp_path, qdrant=url, qdrant_api_key="a-wrong-one"), status=1)["collection"]
        assert refused[1].startswith(f"Qdrant at {url!r} failed: ") and "401" in refused[1]
        assert "a-wrong-one" not in refused[1]
    state, said = examine(config(tmp_path, qdrant=url), status=1)["collection"]
    assert state == "problem" and said.startswith(f"Qdrant at {url!r} failed: ")
