"""clipfleet.Client against a real service: whole lists, faults on the way, and errors as the library's own."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from clipfleet import AsyncClient, Client, ClipfleetError
from clipfleet.errors import (
    Closed,
    DeadlineExceeded,
    EmptyInput,
    FingerprintMismatch,
    ImageCorrupt,
    ImageFormatUnsupported,
    ImageNotFound,
    ImageUnreadable,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RouteNotFound,
    SettingsError,
    Unavailable,
)
from clipfleet.vectors import to_base64
from clipfleet.wire import Packer, png
from tests.deployments.broken import BROKEN
from tests.deployments.front import CUT, SILENT, answer, front
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
        packer = Packer("images")
        large, larger, address = (
            np.zeros((1024, 20480), np.uint8),
            np.zeros((1024, 40960), np.uint8),
            "https://a.example/b",
        )
        items = [large, large, b"", larger, *[b""] * 70, address, address, b"", *[address] * 65]
        parts = [part for part in [*map(packer.add, items), packer.rest()] if part is not None]
        assert [(part.kind, part.first, len(part.items)) for part in parts] == [
            ("files", 0, 1), ("files", 1, 2), ("files", 3, 1), ("files", 4, 64), ("files", 68, 6),
            ("addresses", 74, 2), ("files", 76, 1), ("addresses", 77, 64), ("addresses", 141, 1),
        ]  # fmt: skip
        assert packer.rest() is None

    def test_lower_limits_than_the_defaults_are_learnt_from_refusals(
        self, service: Service, library: Library, files: list[bytes]
    ) -> None:
        with front(service.port, *[answer(413, "too_many_items"), answer(413, "body_too_large")]) as way:
            with Client(way.url) as client:
                assert np.abs(client.embed_images(files[:5]) - library.images(files[:5])).max() <= 1e-5
            assert way.connections == 3

    def test_every_kind_of_image(self, client: Client, library: Library, picture_files: list[Path]) -> None:
        content = picture_files[0].read_bytes()
        with Image.open(picture_files[0]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
            kinds: list[Any] = [
                picture_files[0], str(picture_files[0]), content, bytearray(content), memoryview(content), opened, pixels,
                opened.convert("CMYK").convert("RGB"), "data:image/png;base64," + base64.b64encode(content).decode(),
            ]  # fmt: skip
            found = client.embed_images(kinds)
        assert np.abs(found - library.images([content])).max() <= 1e-5

    @pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 3), (30, 40, 4), (1, 1, 3)])
    def test_an_array_is_the_png_that_pillow_reads(self, shape: tuple[int, ...]) -> None:
        array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        with Image.open(io.BytesIO(png(array))) as opened:
            assert np.array_equal(np.asarray(opened), array.reshape(shape[:2]) if shape[2:] == (1,) else array)

    def test_a_pil_image_keeps_its_orientation(self, client: Client, library: Library) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        for kind in ("PNG", "TIFF", "WEBP"):
            content = encode(
                picture("RGB", 300, 200), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
            )
            with Image.open(io.BytesIO(content)) as opened:
                found = client.embed_images([opened])
            assert np.abs(found - library.images([content])).max() <= 1e-5

    @pytest.mark.parametrize("wrong", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), 3, None, ["a"]])
    def test_what_is_no_image(self, client: Client, wrong: Any) -> None:
        with pytest.raises(TypeError, match="image"):
            client.embed_images([b"", wrong])

    def test_a_progress_bar_on_stderr(self, client: Client, capfd: pytest.CaptureFixture[str]) -> None:
        client.embed_texts(["a", "b"], progress=True)
        assert "2/2" in capfd.readouterr().err
        client.embed_texts(["a", "b"])
        assert capfd.readouterr().err == ""

    def test_rank_and_models(self, client: Client, files: list[bytes]) -> None:
        ranked = client.rank(files[0], ["a red circle", files[1], files[0]])
        assert ranked[0].index == 2 and ranked[0].score == pytest.approx(1, abs=1e-5)
        assert sum(each.probability for each in ranked) == pytest.approx(1, abs=1e-5)
        assert [model["id"] for model in client.models()] == ["tiny"]


class TestStreams:
    def test_errors_have_their_places(
        self, client: Client, library: Library, files: list[bytes], tmp_path: Path
    ) -> None:
        items = [files[number % 12] for number in range(100)]
        items[3], items[80] = BROKEN["cut JPEG"].data, BROKEN["PDF"].data
        found = list(client.stream_images([*items, tmp_path / "nothing.png"]))
        assert [each.index for each in found] == list(range(101))
        errors = {each.index: type(each.error) for each in found if each.error is not None}
        assert errors == {3: ImageCorrupt, 80: ImageFormatUnsupported, 100: ImageNotFound}
        assert all(each.error.index == each.index for each in found if each.error is not None)
        expected = library.images(files)
        good = [each for each in found if each.vector is not None]
        assert len({each.fingerprint for each in good}) == 1
        assert max(np.abs(each.vector - expected[each.index % 12]).max() for each in good) <= 1e-5
        partial = client.embed_images([*items, tmp_path / "nothing.png"], on_error="partial")
        assert list(np.flatnonzero(np.isnan(partial).all(1))) == [3, 80, 100]
        assert client.embed_images([b"none"], on_error="partial").shape == (1, 512), "the dimension is the model's"

    def test_the_first_bad_one_is_raised_wherever_it_is_found(
        self, client: Client, files: list[bytes], tmp_path: Path
    ) -> None:
        with pytest.raises(ImageCorrupt) as caught:
            client.embed_images([files[0], BROKEN["cut JPEG"].data, tmp_path / "nothing.png"])
        assert caught.value.index == 1
        with pytest.raises(ImageNotFound) as caught_missing:
            client.embed_images([files[0], tmp_path / "nothing.png", BROKEN["cut JPEG"].data])
        assert caught_missing.value.index == 1

    def test_what_cannot_be_read_here_is_an_error_of_its_item(self, client: Client, files: list[bytes]) -> None:
        with Image.open(io.BytesIO(files[0][:300])) as cut:
            found = list(client.stream_images([cut, "nul\0", files[0]]))
        assert [type(each.error) for each in found] == [ImageCorrupt, ImageUnreadable, type(None)]
        texts = list(client.stream_texts(["a", "\ud800", "b"]))
        assert [type(each.error) for each in texts] == [type(None), InvalidRequest, type(None)]

    def test_what_its_owner_changes_later_is_sent_as_it_was(
        self, client: Client, library: Library, picture_files: list[Path]
    ) -> None:
        def frames() -> Iterator[Any]:
            buffer = np.zeros((64, 64, 3), np.uint8)
            for level in (0, 120, 250):
                buffer[:32] = level
                yield buffer
            for file in picture_files[:3]:
                with Image.open(file) as opened:
                    yield opened

        expected = [
            png(np.repeat(np.array([[[level] * 3], [[0] * 3]], np.uint8), 32, 0).repeat(64, 1))
            for level in (0, 120, 250)
        ]
        expected += [file.read_bytes() for file in picture_files[:3]]
        assert np.abs(client.embed_images(frames()) - library.images(expected)).max() <= 1e-5

    def test_texts_that_are_cut_say_so(self, client: Client) -> None:
        assert [each.truncated for each in client.stream_texts(["a", "word " * 200])] == [False, True]
        assert isinstance(list(client.stream_texts(["a", ""]))[1].error, EmptyInput)

    def test_an_endless_source_is_drawn_from_as_needed(self, service: Service) -> None:
        drawn = itertools.count()
        with Client(service.url, concurrency=2) as client:
            stream = client.stream_texts(f"text {next(drawn)}" for _ in itertools.repeat(None))
            assert [next(stream).index for _ in range(3000)] == list(range(3000))
            stream.close()
        assert next(drawn) <= 2048 * 4 + 1

    def test_the_source_is_drawn_from_in_the_callers_thread(self, client: Client) -> None:
        connection = sqlite3.connect(":memory:")  # refuses other threads
        rows = connection.execute("SELECT 'a red circle' UNION SELECT 'a blue star'")
        assert client.embed_texts(text for (text,) in rows).shape == (2, 512)
        connection.close()

    def test_a_source_that_raises(self, client: Client) -> None:
        def source() -> Iterator[str]:
            yield from ["a"] * 5000
            raise LookupError("no more")

        with pytest.raises(LookupError):
            client.embed_texts(source())
        assert client.embed_texts(["a"]).shape == (1, 512)

    def test_threads_share_a_client(self, client: Client, library: Library) -> None:
        texts = [f"thing {number}" for number in range(32)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda text: client.embed_texts([text])[0], texts))
        assert np.abs(np.stack(found) - library.texts(texts)).max() <= 1e-5

    def test_after_its_end(self, service: Service) -> None:
        with Client(service.url) as client:
            client.embed_texts(["a"])
        with pytest.raises(Closed):
            client.embed_texts(["a"])
        assert not any(thread.name == "clipfleet-client" for thread in threading.enumerate())

    def test_a_forgotten_one_ends_with_its_process(self, service: Service) -> None:
        code = f"from clipfleet import Client; c = Client({service.url!r}); print(c.embed_texts(['a']).shape)"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 512)\n", "")

    @pytest.mark.parametrize("concurrency", [0, -1])
    def test_no_concurrency(self, concurrency: int) -> None:
        with pytest.raises(SettingsError, match="concurrency"):
            Client("http://127.0.0.1:9", concurrency=concurrency)


class TestAsync:
    def test_the_same_as_the_other(self, service: Service, library: Library, files: list[bytes]) -> None:
        async def letters() -> AsyncIterator[str]:
            for letter in "abc":
                await asyncio.sleep(0)
                yield letter

        async def ask() -> None:
            async with AsyncClient(service.url) as client:
                images, texts = await asyncio.gather(client.embed_images(files), client.embed_texts(letters()))
                assert np.abs(images - library.images(files)).max() <= 1e-5
                assert np.abs(texts - library.texts(["a", "b", "c"])).max() <= 1e-5
                streamed = [each.error async for each in client.stream_images([files[0], b"none"])]
                assert streamed[0] is None and isinstance(streamed[1], ImageFormatUnsupported)
                assert (await client.rank("a", ["b", "a"]))[0].index == 1
                assert (await client.models())[0]["id"] == "tiny"
                with pytest.raises(ImageFormatUnsupported):
                    await client.embed_images([b"none"])

        asyncio.run(ask())

    def test_what_is_left_in_the_middle_is_cancelled(self, service: Service) -> None:
        async def ask() -> None:
            async with AsyncClient(service.url) as client:
                stream = client.stream_texts(f"text {number}" for number in range(20_000))
                async for each in stream:
                    assert each.index == 0
                    break
                await stream.aclose()
                assert len(asyncio.all_tasks()) == 1

        asyncio.run(ask())


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
        with pytest.raises(TypeError, match="list of texts is needed, not one str"):
            client.embed_texts("a red circle")
        with pytest.raises(TypeError, match="list of images is needed, not one bytes"):
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
            pytest.raises((Unavailable, DeadlineExceeded), match=r"127\.0\.0\.1:9/? cannot be reached"),
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
            # The deadline passes between two tries, or during one.
            with pytest.raises((Unavailable, DeadlineExceeded), match="at the front"):
                client.embed_texts(["a"])
            assert way.connections > 1
        with (
            front(service.port, answer(429, "overloaded", retry_after=60)) as way,
            Client(way.url, deadline_s=50) as client,
            pytest.raises(Overloaded),
        ):
            client.embed_texts(["a"])
        assert time.monotonic() - began < 10

    def test_a_service_that_says_nothing_any_more(self, service: Service) -> None:
        with (
            front(service.port, answer(503), SILENT) as way,
            Client(way.url, deadline_s=2) as client,
            pytest.raises(DeadlineExceeded, match=r"within 2 s; before that: .*at the front"),
        ):
            client.embed_texts(["a"])

    def test_a_service_that_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with Client(address, deadline_s=0.5) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
                client.embed_texts(["a"])

    def test_the_deadline_is_for_the_whole_request(self, service: Service) -> None:
        def drip(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    time.sleep(0.2)
                    connection.sendall(b" ")

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=lambda: drip(listening.accept()[0]), daemon=True)
            thread.start()
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with Client(address, deadline_s=1) as client, pytest.raises(DeadlineExceeded, match="within 1 s"):
                client.embed_texts(["a"])
        thread.join(10)

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
    row = {"embedding": to_base64(np.ones(512, np.float32))}
    body = json.dumps({"data": [row] * 64, "fingerprint": "f00d"}).encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    first = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    with (
        front(service.port, first) as way,
        Client(way.url, concurrency=1) as client,
        pytest.raises(FingerprintMismatch, match="f00d"),
    ):
        client.embed_images([files[0]] * 65)


def test_the_example_of_the_reference_runs(service: Service, picture_files: list[Path]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "http.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "from clipfleet import" in block]
    block = block.replace("http://127.0.0.1:8000", service.url).replace(
        'Path("pictures")', f'Path("{picture_files[0].parent}")'
    )
    names: dict[str, object] = {}
    exec(block, names)
    assert np.shape(names["images"]) == (12, 512)
