"""A service as in production, with HTTPS, API keys, limits, two ingresses and decoders by load: who is let in, who is
refused, what happens to it under load, and its end."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import httpx2
import numpy as np
import openai
import pytest
import yaml
from PIL import Image

from clipfleet.keys import add_key, revoke_key
from faults.nodes import second_node
from tests.deployments.processes import Process, alive, below, until
from tests.deployments.service import CERTIFICATE, ROOT, Service, serving, trusted
from tests.library import Library
from tests.pictures import encode, picture

PER_KEY, IN_ALL = 8, 12
IN_THE_CONFIG = "a key that stands in the config"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.txt"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, str]:
    return {name: add_key(keys_file, name) for name in ("shop", "importer", "old")}


@pytest.fixture(scope="module")
def keyed(keys_file: Path, keys: dict[str, str]) -> Iterator[Service]:
    config, autoscale = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("demo", "autoscale")
    )
    application = config["applications"][0]
    application["args"] |= {
        "api_keys_file": str(keys_file),
        "api_keys": [IN_THE_CONFIG],
        "limits": {"inflight_items": IN_ALL, "inflight_items_per_key": PER_KEY},
    }
    ingress, decoder, *encoders = application["deployments"]
    ingress["num_replicas"] = 2
    decoder.clear()
    decoder.update(autoscale["applications"][0]["deployments"][1])
    decoder["autoscaling_config"]["target_ongoing_requests"] = 2  # eight clients are enough for a second one
    for encoder in encoders:
        encoder["max_replicas_per_node"] = 1
    file = keys_file.with_name("keyed.yaml")
    file.write_text(yaml.safe_dump(config))
    assert keys
    with serving(file, "--host", "0.0.0.0", "--tls", CERTIFICATE) as service:
        yield service


def _client(service: Service, key: str) -> httpx.Client:
    return service.client(headers={"Authorization": f"Bearer {key}", "Accept": "application/x-npy"})


def _slow(number: int) -> bytes:
    """A PNG of a few kB and 9 megapixels, which takes a decoder a quarter of a second."""
    row = np.roll(np.arange(256, dtype=np.uint8), number)
    return encode(Image.fromarray(np.tile(row, (3000, 12))), "PNG")


@contextmanager
def _asking(
    service: Service, key: str, bodies: list[bytes], vectors: np.ndarray, clients: int = 4
) -> Iterator[Counter[str]]:
    """Clients that send one image after the other, and what came of it: `right`, or what else."""
    told: Counter[str] = Counter()
    stop = threading.Event()

    def client(number: int) -> None:
        with _client(service, key) as http:
            while not stop.is_set():
                number = (number + 1) % len(bodies)
                try:
                    answer = http.post("/v1/embeddings/images", files=[("files", ("a", bodies[number]))])
                    if answer.status_code != 200:
                        told[answer.text] += 1
                    else:
                        found = np.load(io.BytesIO(answer.content))[0]
                        told["right" if np.abs(found - vectors[number]).max() <= 1e-5 else "wrong"] += 1
                except httpx.HTTPError as error:
                    told[repr(error)] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: told.total() > 20, 60, "answers")
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_who_is_let_in(keyed: Service, keys: dict[str, str], keys_file: Path) -> None:
    def status(key: str | None, path: str = "/v1/models") -> int:
        with keyed.client(headers={} if key is None else {"Authorization": f"Bearer {key}"}) as http:
            return http.get(path).status_code

    assert [status(None), status("nobody's"), status(f"{keys['shop']}x")] == [401, 401, 401]
    assert [status(keys["shop"]), status(keys["importer"]), status(keys["old"])] == [200, 200, 200]
    assert status(IN_THE_CONFIG) == 200
    open_paths = ("/healthz", "/readyz", "/health", "/.well-known/live", "/.well-known/ready")
    assert [status(None, path) for path in open_paths] == [200, 200, 200, 204, 204]
    assert [status(None, path) for path in ("/docs", "/openapi.json", "/models", "/meta", "/v1/stats")] == [401] * 5
    assert [status(None, path) for path in ("/", "/page/page.js", "/page/", "/page/page.js/")] == [200, 200, 401, 401]
    with (
        httpx2.Client(verify=trusted(), trust_env=False) as https,
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="nobody's", http_client=https) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(input="a", model="tiny")
    assert f"https://0.0.0.0:{keyed.port}" in keyed.command.out
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{keyed.port}/healthz", trust_env=False, timeout=10).raise_for_status()
    revoke_key(keys_file, "old")
    until(lambda: [status(keys["old"]) for _ in range(8)] == [401] * 8, 30, "a refusal of the revoked key")
    assert status(keys["shop"]) == 200


def test_one_key_does_not_starve_another(keyed: Service, keys: dict[str, str]) -> None:
    """And what is over the limits is refused with advice, at once, while the rest is answered."""
    told: dict[str, Counter[int]] = {name: Counter() for name in ("importer", "shop")}
    stop = threading.Event()

    def importing(number: int) -> None:
        images = [("files", ("a", _slow(number + place))) for place in range(PER_KEY)]
        with _client(keyed, keys["importer"]) as http:
            while not stop.is_set():
                answer = http.post("/v1/embeddings/images", files=images)
                told["importer"][answer.status_code] += 1
                if answer.status_code == 429:
                    assert int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] == "overloaded"

    with ThreadPoolExecutor(8) as pool:
        imports = [pool.submit(importing, number) for number in range(8)]
        try:
            until(lambda: told["importer"][429] > 4 and told["importer"][200] > 1, 90, "refusals and answers")
            with _client(keyed, keys["shop"]) as http:
                for number in range(10):
                    body = encode(picture("RGB", 60 + number, 40), "PNG")
                    told["shop"][http.post("/v1/embeddings/images", files=[("files", ("a", body))]).status_code] += 1
                    told["shop"][http.post("/v1/embeddings", json={"input": f"text {number}"}).status_code] += 1
        finally:
            stop.set()
        assert all(done.result() is None for done in imports)
    assert told["shop"] == {200: 20}
    assert set(told["importer"]) == {200, 429}


def test_a_second_decoder_comes_with_load_and_goes_without(keyed: Service, keys: dict[str, str]) -> None:
    stop = threading.Event()
    statuses: Counter[int] = Counter()

    def client(number: int) -> None:
        with _client(keyed, keys["shop"]) as http:
            while not stop.is_set():
                body = _slow(number)
                statuses[http.post("/v1/embeddings/images", files=[("files", ("a", body))]).status_code] += 1

    def decoders() -> int:
        return len(keyed.replicas("ImageDecoder"))

    until(lambda: decoders() == 1, 60, "one decoder")  # what came before was load too
    with ThreadPoolExecutor(PER_KEY) as clients:
        done = [clients.submit(client, number) for number in range(PER_KEY)]
        try:
            until(lambda: decoders() == 2, 120, "two decoders under load")
        finally:
            stop.set()
    assert all(each.result() is None for each in done) and set(statuses) == {200}
    until(lambda: decoders() == 1, 120, "one decoder without load")


def test_a_killed_ingress_fails_no_request(keyed: Service, keys: dict[str, str], library: Library) -> None:
    """Bodies of 4 MiB, by clients that do not try again."""
    bodies = [encode(picture("RGB", 1180, 1170 + number), "BMP") for number in range(4)]
    assert all(4_000_000 < len(body) < 2**22 for body in bodies)
    with _asking(keyed, keys["shop"], bodies, library.images(bodies)) as told:
        victim = keyed.replicas("Ingress")[0]
        os.kill(victim.pid, signal.SIGKILL)
        so_far = told.total()
        until(lambda: told.total() > so_far + 40 and len(keyed.replicas("Ingress")) == 2, 90, "another ingress")
    assert set(told) == {"right"}, told


def test_a_serve_controller_that_dies_fails_no_request(keyed: Service, keys: dict[str, str], library: Library) -> None:
    def controllers() -> list[int]:
        return [process.pid for process in keyed.processes() if "ServeController" in process.title]

    bodies = [encode(picture("RGB", 300, 200 + number), "JPEG") for number in range(4)]
    with _asking(keyed, keys["shop"], bodies, library.images(bodies)) as told:
        (victim,) = controllers()
        os.kill(victim, signal.SIGKILL)
        until(lambda: controllers() not in ([], [victim]), 90, "another controller")
        so_far = told.total()
        until(lambda: told.total() > so_far + 40, 60, "answers")
    assert set(told) == {"right"}, told


def test_a_second_node_that_dies_fails_no_request(
    keyed: Service, keys: dict[str, str], keys_file: Path, library: Library
) -> None:
    """It has an encoder, as the first has; what was on it is served by the first."""
    config_file = keys_file.with_name("keyed.yaml")
    config = yaml.safe_load(config_file.read_text())
    next(d for d in config["applications"][0]["deployments"] if d["name"] == "ImageEncoder")["num_replicas"] = 2
    bodies = [encode(picture("RGB", 300, 200 + number), "JPEG") for number in range(4)]
    with second_node(keyed.command.pid) as node:

        def theirs() -> list[Process]:
            return [process for process in below(node) if process.title.endswith(":ImageEncoder")]

        config_file.write_text(yaml.safe_dump(config))
        ready = keyed.command.out.count("clipfleet ready: ")
        keyed.command.send(signal.SIGHUP)
        until(lambda: keyed.command.out.count("clipfleet ready: ") > ready, 120, "an encoder on each node")
        assert len(theirs()) == 1, below(node)
        (raylet,) = [process for process in below(node) if "/raylet/raylet" in process.title]
        with _asking(keyed, keys["shop"], bodies, library.images(bodies)) as told:
            os.kill(raylet.pid, signal.SIGKILL)
            until(lambda: not theirs(), 30, "an end of the node's encoder")
            so_far = told.total()
            until(lambda: told.total() > so_far + 100, 60, "answers")
    assert set(told) == {"right"}, told


def test_no_key_is_written_anywhere(keyed: Service, keys: dict[str, str]) -> None:
    """When all the others have used them."""
    every = [*keys.values(), IN_THE_CONFIG]
    written = [file for file in keyed.folder.rglob("*") if file.is_file() and not file.is_socket()]
    assert written
    found = [file for file in written for key in every if key.encode() in file.read_bytes()]
    assert found == []
    assert not any(key in keyed.command.out + keyed.command.err for key in every)


def test_a_group_signal_stops_it_in_order(keyed: Service, keys: dict[str, str]) -> None:
    """`kill %1` in a shell reaches the whole process group; Ctrl-C in a terminal does too. The last of this module."""

    bodies, connected = [_slow(number) for number in range(PER_KEY)], threading.Barrier(PER_KEY)

    def embed(body: bytes) -> int:
        with _client(keyed, keys["shop"]) as http:
            assert http.get("/healthz").status_code == 200
            connected.wait(60)
            return http.post("/v1/embeddings/images", files=[("files", ("a", body))]).status_code

    known = keyed.command.below()
    with ThreadPoolExecutor(PER_KEY) as clients:
        answers = [clients.submit(embed, body) for body in bodies]
        until(lambda: any(answer.done() for answer in answers), 60, "a first answer")
        os.killpg(keyed.command.pid, signal.SIGINT)
        assert [answer.result() for answer in answers] == PER_KEY * [200], "what was in flight is finished"
    assert keyed.command.wait(60) == 0 and keyed.command.err == ""
    assert known and not alive(known)
