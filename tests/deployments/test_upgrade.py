"""What changes in a running service: HAProxy that dies, and a config file that is read again."""

from __future__ import annotations

import base64
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from tests.checkpoints import make_clip
from tests.deployments.processes import until
from tests.deployments.service import Service
from tests.library import Library
from tests.pictures import encode, picture

RAW = {"Content-Type": "application/octet-stream", "Accept": "application/x-npy"}
HEADER = "X-Clipfleet-Fingerprint"


@pytest.fixture
def body() -> bytes:
    return encode(picture("RGB", 320, 200), "JPEG")


def _status(service: Service, body: bytes) -> int | str:
    try:
        with service.client(headers=RAW) as http:
            return http.post("/v1/embeddings/images", content=body).status_code
    except httpx.HTTPError as error:
        return repr(error)


def test_haproxy_that_dies_is_started_anew(other_service: Service, body: bytes) -> None:
    (victim,) = [process for process in other_service.processes() if "haproxy -db" in process.title]
    os.kill(victim.pid, signal.SIGKILL)
    # Serve itself would take half a minute.
    until(lambda: _status(other_service, body) == 200, 15, "an answer after HAProxy was killed")
    (ingress,) = other_service.replicas("Ingress")
    os.kill(ingress.pid, signal.SIGKILL)  # the new one has to be told where the new ingress listens
    until(lambda: other_service.replicas("Ingress") not in ([], [ingress]), 60, "another ingress")
    until(lambda: _status(other_service, body) == 200, 60, "an answer by another ingress")


@contextmanager
def asking(
    service: Service, asked: list[object], right: dict[str, np.ndarray], clients: int = 4
) -> Iterator[Counter[str]]:
    """Clients that ask all the while, and what they were told: a fingerprint where the vectors were those of it."""
    told: Counter[str] = Counter()
    stop = threading.Event()

    def ask(http: httpx.Client) -> str:
        answer = http.post("/v1/embeddings", json={"input": asked})
        if answer.status_code != 200:
            return answer.text
        made_by = answer.headers[HEADER]
        vectors = np.array([item["embedding"] for item in answer.json()["data"]])
        mixed = vectors.shape != right[made_by].shape or np.abs(vectors - right[made_by]).max() > 1e-5
        return f"not the vectors of {made_by}" if mixed else made_by

    def client() -> None:
        with service.client() as http:
            while not stop.is_set():
                try:
                    told[ask(http)] += 1
                except Exception as error:
                    told[repr(error)] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: sum(told.values()) > 8, 60, "answers")
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_another_checkpoint_fails_no_request(
    other_service: Service, flags: Path, body: bytes, library: Library, tmp_path: Path
) -> None:
    other = make_clip(tmp_path / "other")
    names = {name: fingerprint(find_checkpoint(name)) for name in ("tiny", str(other))}
    asked: list[object] = [{"image": base64.b64encode(body).decode()}, "a red circle", "a blue star"]
    right = {
        made_by: np.concatenate([each.images([body]), each.texts(["a red circle", "a blue star"])])
        for made_by, each in ((names["tiny"], library), (names[str(other)], Library(str(other))))
    }
    file = flags / "other.yaml"
    before = file.read_text()

    def change(content: str, *, refused: bool = False) -> None:
        file.write_text(content)
        command, wanted = other_service.command, "nothing was changed" if refused else "clipfleet ready: "
        said = command.err.count(wanted) if refused else command.out.count(wanted)
        command.send(signal.SIGHUP)
        until(lambda: (command.err if refused else command.out).count(wanted) > said, 120, wanted)

    config = yaml.safe_load(before)
    config["applications"][0]["args"]["model"] = str(other)
    with asking(other_service, asked, right) as told:
        change("applications: {}", refused=True)
        assert set(told) == {names["tiny"]}
        change(yaml.safe_dump(config))
        assert "clipfleet: starting a new graph beside the one that runs" in other_service.command.out
        until(lambda: names[str(other)] in told, 30, "answers of the other checkpoint")
        change(before)
        so_far = sum(told.values())
        until(lambda: sum(told.values()) > so_far + 20, 60, "answers after the change back")
    assert set(told) == set(names.values()), told
    with other_service.client() as http:
        assert http.get("/readyz").headers[HEADER] == names["tiny"]
