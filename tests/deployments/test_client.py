"""clipfleet.Client against a real service: whole lists, faults on the way, and errors as the library's own."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipfleet import Client, ClipfleetError
from clipfleet.client import _parts
from clipfleet.errors import (
    DeadlineExceeded,
    EmptyInput,
    FingerprintMismatch,
    ImageCorrupt,
    ImageFormatUnsupported,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RouteNotFound,
    SettingsError,
    Unavailable,
)
from clipfleet.vectors import to_npy
from tests.deployments.broken import BROKEN
from tests.deployments.front import CUT, answer, front
from tests.deployments.listener import Listener, in_thread
from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service
from tests.library import Library
from tests.pictures import encode, picture


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


class TestVectors:
    def test_images_as_content_and_as_paths(
        self, client: Client, library: Library, files: list[bytes], picture_files: list[Path]
    ) -> None:
        found = client.embed_images([files[0], picture_files[1], str(picture_files[2])])
        assert (found.shape, found.dtype) == ((3, 512), np.float32)
        assert np.abs(found - library.images(files[:3])).max() <= 1e-5

    def test_texts(self, client: Client, library: Library) -> None:
        texts = ["a red circle", "ein Käfer \U0001f41e", '"quoted"\n']
        found = client.embed_texts(texts)
        assert (found.shape, found.dtype) == ((3, 512), np.float32)
        assert np.abs(found - library.texts(texts)).max() <= 1e-5

    def test_more_items_than_a_request_may_have(self, client: Client, library: Library, files: list[bytes]) -> None:
        found = client.embed_images(files[number % 12] for number in range(150))
        assert np.abs(found - library.images(files)[np.arange(150) % 12]).max() <= 1e-5
        texts = [f"a red circle {number % 50}" for number in range(5000)]
        assert np.abs(client.embed_texts(texts) - library.texts(texts[:50])[np.arange(5000) % 50]).max() <= 1e-5

    def test_more_bytes_than_a_request_may_have(self, client: Client, library: Library) -> None:
        large = [encode(picture("RGB", 2000, 2000 + number), "BMP") for number in range(2)]  # 12 MB each
        found = client.embed_images(large * 3)
        assert np.abs(found - np.tile(library.images(large), (3, 1))).max() <= 1e-5

    def test_parts_keep_order_and_limits(self) -> None:
        sizes = [20, 20, 3, 40, 1, 1] + [0] * 7
        parts = list(_parts([size * 2**20 for size in sizes], 4, lambda size: size))
        assert [first for first, _ in parts] == [0, 1, 3, 4, 8, 12]
        assert [len(part) for _, part in parts] == [1, 2, 1, 4, 4, 1]
        assert list(_parts([], 4, len)) == []

    def test_lower_limits_than_the_defaults_are_learnt_from_refusals(
        self, service: Service, library: Library, files: list[bytes]
    ) -> None:
        with front(service.port, *[answer(413, "too_many_items"), answer(413, "body_too_large")]) as way:
            with Client(way.url) as client:
                assert np.abs(client.embed_images(files[:5]) - library.images(files[:5])).max() <= 1e-5
            assert way.connections == 3


class TestErrors:
    def test_a_bad_image_has_its_place_in_the_whole_list(self, client: Client, files: list[bytes]) -> None:
        many = [files[number % 12] for number in range(100)]
        with pytest.raises(ImageCorrupt, match="truncated") as caught:
            client.embed_images([*many[:90], BROKEN["cut JPEG"].data, *many[90:]])
        assert (caught.value.index, caught.value.data["status"]) == (90, 422)
        with pytest.raises(ImageFormatUnsupported) as caught_pdf:
            client.embed_images([BROKEN["PDF"].data])
        assert caught_pdf.value.index == 0

    def test_what_is_no_list_of_items(self, client: Client, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="list of texts, not str"):
            client.embed_texts("a red circle")
        with pytest.raises(TypeError, match="list of images, not bytes"):
            client.embed_images(b"an image")  # type: ignore[arg-type]
        with pytest.raises(EmptyInput):
            client.embed_images([])
        with pytest.raises(EmptyInput) as caught:
            client.embed_texts(["a", ""])
        assert caught.value.index == 1
        with pytest.raises(FileNotFoundError):
            client.embed_images([tmp_path / "nothing.png"])
        with pytest.raises(InvalidRequest):
            client.embed_texts(["\ud800"])

    def test_another_model(self, service: Service, files: list[bytes]) -> None:
        with Client(service.url, model="tiny") as client:
            assert len(client.embed_images(files[:1])) == len(client.embed_texts(["a"])) == 1
        with Client(service.url, model="gpt-4") as client:
            for ask in (lambda: client.embed_images(files[:1]), lambda: client.embed_texts(["a"])):
                with pytest.raises(ModelNotFound, match="'tiny'"):
                    ask()

    def test_no_address_and_no_service(self, service: Service) -> None:
        for address in ("somewhere", "ftp://127.0.0.1", "http://127.0.0.1:80a", "http://"):
            with pytest.raises(SettingsError, match="no address of a service"):
                Client(address)
        with (
            Client("http://127.0.0.1:9", deadline_s=0.3) as client,
            pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"),
        ):
            client.embed_texts(["a"])
        with Client(f"{service.url}/elsewhere") as client, pytest.raises(RouteNotFound):
            client.embed_texts(["a"])

    @pytest.mark.parametrize("key", ["", "two\nlines", "a key ", "schlüssel"])
    def test_a_key_that_no_header_can_hold(self, key: str) -> None:
        with pytest.raises(SettingsError, match="API key") as caught:
            Client("http://127.0.0.1:9", key)
        assert not key or key not in str(caught.value)


class TestFaultsOnTheWay:
    def test_each_of_them_is_tried_again(self, service: Service, library: Library, files: list[bytes]) -> None:
        page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
        half = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\nContent-Length: 9000\r\n\r\n\x93NUMPY"
        faults = (CUT, answer(503), half, page, answer(504, "deadline_exceeded"), answer(429, "overloaded"))
        with front(service.port, *faults) as way, Client(way.url) as client:
            assert np.abs(client.embed_images(files) - library.images(files)).max() <= 1e-5
            assert way.connections == len(faults) + 1
            client.embed_images(files[:1])
            client.embed_texts(["a red circle"])
            assert way.connections == len(faults) + 1, "the connection is kept"

    def test_it_waits_as_long_as_it_is_told(self, service: Service) -> None:
        with front(service.port, answer(429, "overloaded", retry_after=1)) as way, Client(way.url) as client:
            began = time.monotonic()
            client.embed_texts(["a red circle"])
            assert 1 <= time.monotonic() - began < 10

    def test_it_gives_up_at_its_deadline_with_the_last_error(self, service: Service) -> None:
        began = time.monotonic()
        with front(service.port, *[answer(503)] * 50) as way, Client(way.url, deadline_s=1) as client:
            with pytest.raises(Unavailable, match="at the front"):
                client.embed_texts(["a"])
            assert way.connections > 1
        with (
            front(service.port, answer(429, "overloaded", retry_after=60)) as way,
            Client(way.url, deadline_s=50) as client,
            pytest.raises(Overloaded),
        ):
            client.embed_texts(["a"])
        assert time.monotonic() - began < 10

    def test_a_service_that_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with Client(address, deadline_s=0.5) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
                client.embed_texts(["a"])

    def test_what_would_fail_again_is_not_tried_again(self, service: Service) -> None:
        for status, code in ((400, "invalid_request"), (401, "invalid_api_key"), (422, "image_corrupt"), (500, "x")):
            with front(service.port, answer(status, code)) as way, Client(way.url) as client:
                with pytest.raises(ClipfleetError) as caught:
                    client.embed_texts(["a"])
                assert caught.value.data["status"] == status and way.connections == 1

    def test_a_certificate_that_is_not_trusted(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(ROOT / "tests" / "data" / "localhost.pem")

        class Encrypted(Listener):
            def get_request(self) -> tuple[socket.socket, object]:
                self.connections += 1
                connection, address = super().get_request()
                return context.wrap_socket(connection, server_side=True), address

        with in_thread(Encrypted()) as listener:
            with (
                Client(f"https://127.0.0.1:{listener.port}") as client,
                pytest.raises(Unavailable, match="CERTIFICATE"),
            ):
                client.embed_texts(["a"])
            assert listener.connections == 1, "it would be the same the next time"

    def test_an_answer_in_an_encoding_that_is_none(self, service: Service) -> None:
        cut = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab"
        with front(service.port, cut) as way, Client(way.url) as client:
            with pytest.raises(Unavailable, match="does not decode"):
                client.embed_texts(["a"])
            assert way.connections == 1

    def test_answers_that_are_none_of_a_services(self, service: Service) -> None:
        ok = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
        for body in (b"", b"{}", b'{"data": [], "fingerprint": "f"}', b"<html>"):
            with (
                front(service.port, ok % (b"text/html", len(body), body)) as way,
                Client(way.url) as client,
                pytest.raises(Unavailable, match="none of clipfleet's"),
            ):
                client.embed_texts(["a"])

    def test_the_only_ingress_dies_under_uploads(self, service: Service, library: Library) -> None:
        """None that HAProxy could send them to, and too large for it to send again: the client does."""
        bodies = [encode(picture("RGB", 1700, 1650 + number), "BMP") for number in range(4)]  # 8 MiB each
        expected = library.images(bodies)
        stop, wrong, answered = threading.Event(), [], []

        def upload(body: bytes, vector: np.ndarray) -> None:
            with Client(service.url) as client:
                while not stop.is_set():
                    try:
                        found = client.embed_images([body])[0]
                        answered.append(time.monotonic())
                        wrong.extend([] if np.abs(found - vector).max() <= 1e-5 else ["another vector"])
                    except ClipfleetError as error:
                        wrong.append(repr(error))

        threads = [threading.Thread(target=upload, args=pair) for pair in zip(bodies, expected, strict=True)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(answered) > 8, 60, "answers before the kill")
            (victim,) = service.replicas("Ingress")
            os.kill(victim.pid, signal.SIGKILL)
            so_far = len(answered)
            until(lambda: len(answered) > so_far + 12, 90, "answers after the kill")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        with service.client() as http:
            until(lambda: http.get("/readyz").status_code == 200, 60, "ready again")


def test_a_checkpoint_that_changes_in_the_middle_of_a_list(service: Service, files: list[bytes]) -> None:
    body = to_npy(np.ones((64, 512), np.float32))
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\nX-Clipfleet-Fingerprint: f00d\r\n"
    first = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    with front(service.port, first) as way, Client(way.url) as client, pytest.raises(FingerprintMismatch, match="f00d"):
        client.embed_images([files[0]] * 65)


def test_the_example_of_the_reference_runs(service: Service, picture_files: list[Path]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "http.md").read_text(), re.DOTALL)
    block = block.replace("http://127.0.0.1:8000", service.url).replace(
        'Path("pictures")', f'Path("{picture_files[0].parent}")'
    )
    names: dict[str, object] = {}
    exec(block, names)
    assert np.shape(names["images"]) == (12, 512)
