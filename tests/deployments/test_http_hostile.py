"""Requests made to cost time or memory, or to be read in two ways: each gets its answer soon, and the ingress stays small."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import httpx
import pytest

from clipfleet.errors import TooManyItems
from deployments.bodies import check_structure
from deployments.haproxy_wrapper import BUFFER_BYTES_ALONE
from deployments.one_piece import LINGER_S
from faults.mutate import mutants
from tests.deployments.processes import until
from tests.deployments.raw import Answer, chunked, request, send
from tests.deployments.service import Service
from tests.deployments.test_http_embeddings import refused, vectors
from tests.test_image_limits import headers as promises

# What goes out until a refusal arrives depends on how busy the machine is; it was up to 170 MiB.
READ_ON = 1000 * 2**20
MIB = 2**20
URL = "/v1/embeddings/images"
TEXT = b'{"input": "a red circle"}'
SOON_S = 10.0  # far above what any of these takes, far below what one that stops the ingress would take


@contextmanager
def bounded(service: Service, megabytes: float) -> Iterator[None]:
    """The ingress grows by less than this at any moment of the block, which ends soon."""
    (ingress,) = service.replicas("Ingress")
    home = Path("/proc", str(ingress.pid))

    def status(name: str) -> float:
        lines = (home / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    (home / "clear_refs").write_text("5")  # proc(5): what it has now counts as its highest so far
    before, began = status("VmRSS:"), time.monotonic()
    yield
    took, grown = time.monotonic() - began, status("VmHWM:") - before
    assert grown < megabytes, f"the ingress grew by {grown:.0f} MB"
    assert took < SOON_S, f"took {took:.1f} s"


def framed(body: bytes, *headers: str) -> bytes:
    """A request whose body is to be read in chunks."""
    return request(body, "Transfer-Encoding: chunked", *headers, length=False)


def one(service: Service, pieces: bytes | Iterator[bytes]) -> Answer:
    """The one answer to what is one request."""
    answers, _ = send(service.port, pieces)
    assert len(answers) == 1, answers
    return answers[0]


class TestFraming:
    """Where a request ends must never be a matter of opinion, or a second one hides in the first."""

    @pytest.mark.parametrize(
        "raw",
        [
            request(TEXT, "Content-Length: -5", length=False),
            request(TEXT, "Content-Length: +25", length=False),
            request(TEXT, "Content-Length: 0x19", length=False),
            request(TEXT, "Content-Length: many", length=False),
            request(TEXT, "Content-Length: 2 5", length=False),
            request(TEXT, "Content-Length: 25, 26", length=False),
            request(TEXT, "Content-Length: 5"),
            request(TEXT, f"Content-Length: {10**30}", length=False),
            request(chunked(TEXT), "Transfer-Encoding: chunked, chunked", length=False),
            request(chunked(TEXT), "Transfer-Encoding: chunked", "Transfer-Encoding: identity", length=False),
            request(chunked(TEXT), "Transfer-Encoding: chunked, gzip", length=False),
            request(chunked(TEXT), "Transfer-Encoding: xchunked", length=False),
            request(chunked(TEXT), "Transfer-Encoding : chunked", length=False),
            request(chunked(TEXT), "Transfer-Encoding:\x0bchunked", length=False),
            framed(b"-1\r\n" + TEXT),
            framed(b"zz\r\n" + TEXT),
            framed(b"0x19\r\n" + TEXT),
            framed(b"\r\n" + TEXT),
            framed(b"F" * 17 + b"\r\n" + TEXT),
            framed(b"5\r\n" + TEXT + b"\r\n0\r\n\r\n"),
            request(TEXT, "No colon at all"),
            request(TEXT, b"X-Nul: a\0b"),
            request(TEXT, *repeat("X-Many: x", 200)),
            request(TEXT, "X-Large: " + "x" * 2 * MIB),
            request(TEXT, path="/v1/embeddings\xff"),
            b"GET /v1/models\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
            b"nothing that anybody ever meant to be HTTP\r\n\r\n",
        ],
        ids=lambda raw: repr(raw[:25] + b"..." + raw[-60:]),
    )  # fmt: skip
    def test_what_is_no_http(self, service: Service, raw: bytes) -> None:
        """HAProxy's parser refuses it in its own words, which nothing can change, and no replica hears of it."""
        with bounded(service, 10):
            assert one(service, raw).status == 400

    @pytest.mark.parametrize(
        "raw",
        [
            request(TEXT, "X-Large: " + "x" * 70_000),
            request(TEXT, *[f"X-{number}: " + "x" * 1000 for number in range(80)]),
            request(method="GET", path="/v1/models?" + "x" * 63_000),
            request(method="GET", path="/v1/models?" + "x" * 200_000),
            request(TEXT, "Content-Type: multipart/form-data; boundary=x" + '";' * 400_000, path=URL),
            request(method="get", path="/v1/models"),
            request(method="M" * 5000, path="/v1/models"),
        ],
        ids=lambda raw: repr(raw[:25] + b"..." + raw[-60:]),
    )
    def test_headers_that_are_too_long_and_methods_that_are_none(self, service: Service, raw: bytes) -> None:
        with bounded(service, 10):
            answer = one(service, raw)
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        "raw",
        [
            request(chunked(TEXT), "Transfer-Encoding: chunked", "Content-Length: 4", length=False),
            request(chunked(TEXT), "Content-Length: 4", "Transfer-Encoding: chunked", length=False),
            request(chunked(TEXT), "Transfer-Encoding: CHUNKED", length=False),
            framed(chunked(TEXT[:9], TEXT[9:])),
            framed(b"19;" + b"a=b;" * 1000 + b"\r\n" + TEXT + b"\r\n0\r\n\r\n"),
            framed(b"0" * 40 + b"19\r\n" + TEXT + b"\r\n0\r\nX-Trailer: x\r\n\r\n"),
            request(TEXT, f"Content-Length: {len(TEXT)}"),
            request(TEXT, f"Content-Length: {len(TEXT)}, {len(TEXT)}", length=False),
            request(TEXT, "Expect: 100-continue"),
            request(TEXT, version="HTTP/1.0"),
            request(TEXT, version="HTTP/9.9"),
            request(TEXT, path="ftp://here/v1/embeddings"),
        ],
        ids=lambda raw: repr(raw[:25] + b"..." + raw[-60:]),
    )  # fmt: skip
    def test_what_has_one_meaning(self, service: Service, raw: bytes) -> None:
        """It gets its one vector, or is refused; never two answers."""
        answer = one(service, raw)
        assert answer.status == 200 or (answer.status, answer.error["code"]) == (400, "invalid_request")

    def test_a_body_without_a_length_is_none(self, service: Service) -> None:
        for version in ("HTTP/1.1", "HTTP/1.0"):
            answer = one(service, request(TEXT, version=version, length=False))
            assert (answer.status, answer.error["code"]) == (400, "invalid_request")

    def test_requests_in_one_packet_are_answered_in_order(self, service: Service) -> None:
        several = [
            request(TEXT, last=False),
            request(b"{", last=False),
            request(chunked(TEXT), "Transfer-Encoding: chunked", length=False, last=False),
            request(method="GET", path="/healthz", last=False),
            request(method="GET", path="/v1/nothing"),
        ]
        answers, _ = send(service.port, b"".join(several))
        assert [answer.status for answer in answers] == [200, 400, 200, 200, 404]

    def test_a_request_that_is_refused_by_its_headers_hides_none_in_its_body(self, service: Service) -> None:
        hidden = request(method="GET", path="/healthz")
        for outer in (
            request(hidden, "Content-Encoding: gzip", last=False),
            request(hidden, "X-Deadline-Ms: never", last=False),
            request(hidden, path="/v1/nothing", last=False),
            request(hidden, method="GET", path="/v1/models", last=False),
        ):
            answers, _ = send(service.port, outer + request(method="GET", path="/v1/nowhere"))
            assert b"alive" not in b"".join(answer.body for answer in answers)
            assert answers[-1].status == 404 and len(answers) <= 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("OPTIONS", "*"),
        ("OPTIONS", "/v1/models"),
        ("TRACE", "/v1/models"),
        ("CONNECT", "here:443"),
        ("DELETE", "/v1/embeddings"),
        ("GET", "//v1/models"),
        ("GET", "/v1/../v1/models"),
        ("GET", "/v1/models/%00"),
        ("GET", "/v1/models/%ED%A0%80"),
        ("GET", "/v1/models/%"),
        ("GET", "v1/models"),
    ],
    ids=lambda value: value[:30],
)
def test_methods_and_addresses_that_are_none(service: Service, method: str, path: str) -> None:
    answer = one(service, request(method=method, path=path))
    assert answer.status in (400, 404, 405) and answer.error["code"] in (
        "invalid_request",
        "route_not_found",
        "model_not_found",
    )


def test_who_wants_a_websocket_gets_the_page(service: Service) -> None:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    wanted = ("Connection: Upgrade", "Upgrade: websocket", key, "Sec-WebSocket-Version: 13")
    answer = one(service, request(b"", *wanted, method="GET", path="/v1/models", length=False))
    assert answer.status == 200


def test_connections_whose_requests_are_answered_and_go_on_for_ever_end(service: Service) -> None:
    """HAProxy has a place for each, and the rest of a body may come as slowly as a client likes."""
    head = request(b"", "Content-Length: 60000000", path="/absent", length=False, last=False)
    connections = [socket.create_connection(("127.0.0.1", service.port), timeout=20) for _ in range(4)]
    for connection in connections:
        connection.sendall(head + bytes(BUFFER_BYTES_ALONE))
    for connection in connections:
        assert connection.recv(2**16).startswith(b"HTTP/1.1 404")

    def all_ended() -> bool:
        for connection in list(connections):
            try:
                connection.sendall(b"x")
            except OSError:
                connections.remove(connection)
                connection.close()
        return not connections

    until(all_ended, 3 * LINGER_S, "an end of all")


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b'{"input": ["a", "b"]}', 3),
        (b'["a,b[{", "\\",[{", "c"]', 3),
        (b"[,,,", 4),
        (b" " * 1000 + b"[[", 2),
        (b'["never closed,,,', 1),
        (b'["never closed\\', 1),
        (b"no sign", 0),
    ],
)
def test_values_of_json_are_counted_outside_its_strings(body: bytes, values: int) -> None:
    check_structure(body, values)
    if values:
        with pytest.raises(TooManyItems):
            check_structure(body, values - 1)


class TestBodies:
    def test_an_endless_one(self, service: Service) -> None:
        head = request(b"", "Transfer-Encoding: chunked", "Content-Type: image/png", path=URL, length=False)
        piece = b"100000\r\n" + bytes(MIB) + b"\r\n"
        with bounded(service, 64 + 40):
            answers, sent = send(service.port, iter([head, *repeat(piece, 2000)]))
        assert [answer.error["code"] for answer in answers] == ["body_too_large"]
        assert sent < READ_ON, "it reads on although it has refused"

    def test_one_that_announces_too_much_is_refused_before_it_is_read(self, service: Service) -> None:
        head = request(b"", f"Content-Length: {10**15}", "Content-Type: image/png", path=URL, length=False)
        with bounded(service, 10):
            answers, sent = send(service.port, iter([head, *repeat(bytes(MIB), 2000)]))
        assert [answer.error["code"] for answer in answers] == ["body_too_large"]
        assert sent < READ_ON, "it reads on although it has refused"

    @pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"])
    def test_compressed_ones_are_refused_and_not_inflated(self, service: Service, encoding: str) -> None:
        pack = zlib.compress if encoding == "deflate" else gzip.compress
        bomb = pack(b'{"input": "' + b"a" * 200 * MIB + b'"}', 1) if encoding in ("gzip", "deflate") else b"x"
        with bounded(service, 10):
            answer = one(service, request(bomb, f"Content-Encoding: {encoding}"))
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert "Content-Encoding" in answer.error["message"]

    @pytest.mark.parametrize(
        ("name", "body", "status", "code"),
        [
            ("a million items", b'{"input": [' + b'"a",' * 10**6 + b'"a"]}', 413, "too_many_items"),
            ("a million candidates", b'{"query": "a", "candidates": [' + b"[]," * 10**6 + b"1]}", 413, "too_many_items"),
            ("a million fields", b"{" + b'"a":1,' * 10**6 + b'"input":"a"}', 413, "too_many_items"),
            ("a million characters", b'{"input": "' + b"a" * 10**6 + b'"}', 400, "invalid_request"),
            ("a long text of escapes", b'{"input": "' + b"\\u00e4" * 10**6 + b'"}', 400, "invalid_request"),
            ("a model of a million letters", b'{"input": "a", "model": "' + b"a" * 10**6 + b'"}', 404, "model_not_found"),
            ("arrays in arrays", b'{"input": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", 413, "too_many_items"),
            ("objects in objects", b'{"input":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**6, 413, "too_many_items"),
            ("deep, but few", b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_request"),
            ("deep, passed over", b'{"input": "a", "b": ' + b"[" * 1200 + b"]" * 1200 + b"}", 400, "invalid_request"),
            ("opened and never closed", b"[" * 5000, 400, "invalid_request"),
            ("NaN", b'{"input": "a", "dimensions": NaN}', 400, "invalid_request"),
            ("Infinity", b'{"input": "a", "dimensions": -Infinity}', 400, "invalid_request"),
            ("over a double", b'{"input": "a", "dimensions": 1e999}', 400, "invalid_request"),
            ("100,000 digits", b'{"input": "a", "dimensions": ' + b"9" * 10**5 + b"}", 400, "invalid_request"),
            ("a long fraction", b'{"input": "a", "dimensions": 0.' + b"9" * 10**5 + b"}", 400, "invalid_request"),
            ("over 64 bits", b'{"input": "a", "dimensions": 18446744073709551617}', 400, "invalid_request"),
            ("just below", b'{"input": "a", "dimensions": 18446744073709551615}', 400, "unsupported_dimensions"),
            ("below zero", b'{"input": "a", "dimensions": -512}', 400, "unsupported_dimensions"),
            ("a lone surrogate", b'{"input": "\\udc00\\ud800"}', 400, "invalid_request"),
            ("one as a field's name", b'{"input": "a", "\\ud800": 1}', 400, "invalid_request"),
            ("one as the model", b'{"input": "a", "model": "\\ud800"}', 400, "invalid_request"),
            ("one in CESU-8", b'{"input": "\xed\xa0\x80"}', 400, "invalid_request"),
            ("overlong UTF-8", b'{"input": "\xc0\xaf"}', 400, "invalid_request"),
            ("UTF-16", '{"input": "a"}'.encode("utf-16"), 400, "invalid_request"),
            ("a byte order mark", b'\xef\xbb\xbf{"input": "a"}', 400, "invalid_request"),
            ("strings without signs", b'{"a": "' + b"," * 6000 + b'"' + b'""' * (20 * 10**6), 413, "too_many_items"),
            ("base64 of spaces", b'{"input": {"image": "' + b"A " * (14 * 10**6) + b'"}}', 415, "image_format_unsupported"),
            ("two bodies", b'{"input": "a"}{"input": "b"}', 400, "invalid_request"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_json(self, service: Service, name: str, body: bytes, status: int, code: str) -> None:
        path = "/v1/rank" if "candidates" in name else "/v1/embeddings"
        with bounded(service, 4 * len(body) / MIB + 10):
            answer = one(service, request(body, "Content-Type: application/json", path=path))
        assert (answer.status, answer.error["code"]) == (status, code)
        assert len(answer.body) < 1000, "what was sent is not sent back"

    @pytest.mark.parametrize(
        ("item", "said"),
        [
            ({"text": "a", "detail": "low"}, "has the unknown field 'detail'; an item is"),
            ({"img": "a"}, "has the unknown field 'img'; an item is"),
            ({"text": "a", "image": "b"}, "has a text and an image; an item is a string"),
            ({"text": "a", "<b>" * 30: 1}, "has an unknown field; an item is"),
            (3, "none of the accepted types"),
            ({"text": 3}, "none of the accepted types"),
            ({"image": None}, "none of the accepted types"),
        ],
        ids=str,
    )
    def test_what_is_wrong_with_an_item_is_said(self, http: httpx.Client, item: object, said: str) -> None:
        for body, param in (({"input": item}, "input"), ({"input": ["a", item]}, "input[1]")):
            error = http.post("/v1/embeddings", json=body).json()["error"]
            assert said in error["message"] and error["param"] == param

    def test_damaged_files_are_the_clients_fault(self, service: Service, http: httpx.Client) -> None:
        """Of a few; `make fuzz` sends thousands."""
        statuses = Counter(
            http.post("/v1/embeddings/images", content=data, headers={"Content-Type": "image/jpeg"}).status_code
            for data in itertools.islice(mutants(2611), 150)
        )
        assert set(statuses) <= {200, 413, 415, 422} and len(statuses) > 2, statuses
        assert http.get("/readyz").status_code == 200

    def test_a_field_given_twice_counts_the_last_time(self, http: httpx.Client) -> None:
        body = b'{"input": "a red circle", "model": "other", "input": ["a", "b"], "model": "tiny"}'
        assert len(vectors(http.post("/v1/embeddings", content=body))) == 2

    def test_a_number_in_a_text_is_a_text(self, http: httpx.Client) -> None:
        assert len(vectors(http.post("/v1/embeddings", json={"input": ["NaN", "1e999", "\x00", "\U0010ffff"]}))) == 4

    @pytest.mark.parametrize(
        "deadline", ["NaN", "inf", "-inf", "-0", "0x10", "1_000", " ", "\uff11\uff10", "9" * 16, "1, 2"]
    )
    def test_deadlines(self, service: Service, deadline: str) -> None:
        answer = one(service, request(TEXT, f"X-Deadline-Ms: {deadline}"))
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert "X-Deadline-Ms" in answer.error["message"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_tiny_files_that_promise_many_pixels(service: Service, http: httpx.Client, kind: str) -> None:
    with bounded(service, 10):
        for size in (8001, 16_383, 65_535):
            data = promises(size, size)[kind]
            assert len(data) < 3000
            answer = http.post(URL, content=data, headers={"Content-Type": "image/png"})
            refused(answer, 413, "image_too_many_pixels", "files[0]")


def part(name: str = 'filename="a"', content: bytes = b"x", *more: str) -> bytes:
    lines = [f"Content-Disposition: form-data; name=f; {name}", *more, "", ""]
    return b"--cut\r\n" + "\r\n".join(lines).encode() + content + b"\r\n"


END = b"--cut--\r\n"


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("100,000 files", part() * 10**5 + END, 413, "too_many_items"),
        ("100,000 fields", part("x=1") * 10**5 + END, 400, "invalid_request"),
        ("100,000 empty parts", b"--cut\r\n\r\n\r\n" * 10**5 + END, 400, "invalid_request"),
        ("no part at all", END, 400, "empty_input"),
        ("nothing", b"", 400, "invalid_request"),
        ("16 MiB before the first part", b"\r\n" * 8 * MIB + part() + END, 415, "image_format_unsupported"),
        ("16 MiB after the last one", part() + END + b"-" * 16 * MIB, 415, "image_format_unsupported"),
        ("16 MiB that look like its start", part(content=b"\r\n--cu" * 3 * MIB) + END, 415, "image_format_unsupported"),
        ("a header of 16 MiB", part("x=" + "y" * 16 * MIB) + END, 400, "invalid_request"),
        ("a header's name of 16 MiB", part('filename="a"', b"x", "y" * 16 * MIB + ": 1") + END, 400, "invalid_request"),
        ("100,000 headers", part('filename="a"', b"x", *repeat("X: y", 10**5)) + END, 400, "invalid_request"),
        ("headers without an end", b"--cut\r\nX: y\r\n" + b"X: y\r\n" * 10**5, 400, "invalid_request"),
        (
            "16 MiB of spaces behind a boundary",
            part() + part().replace(b"--cut", b"--cut" + b" " * 16 * MIB) + END,
            400,
            "invalid_request",
        ),
        ("300,000 that look like boundaries", part(content=b"\r\n--cutX" * 300_000) + END, 400, "invalid_request"),
        ("another boundary", b"--other\r\n\r\n--other--\r\n", 400, "invalid_request"),
        (
            "a multipart body in a part",
            part('filename="a"', b"--in\r\n\r\nx\r\n--in--", "Content-Type: multipart/mixed; boundary=in") + END,
            415,
            "image_format_unsupported",
        ),
        (
            "its own boundary in a part",
            part('filename="a"', b"--cut\r\n\r\nx\r\n--cut--", "Content-Type: multipart/mixed; boundary=cut") + END,
            415,
            "image_format_unsupported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multipart(service: Service, name: str, body: bytes, status: int, code: str) -> None:
    with bounded(service, 5 * len(body) / MIB + 10):  # a file is joined, packed and sent to a decoder
        answer = one(service, request(body, "Content-Type: multipart/form-data; boundary=cut", path=URL))
    assert (answer.status, answer.error["code"]) == (status, code)
    assert len(answer.body) < 1000


@pytest.mark.parametrize("boundary", ["", "; boundary", "; boundary=", '; boundary=""', "; boundary=" + "b" * 10_000])
def test_multipart_without_a_boundary_that_can_be_used(service: Service, boundary: str) -> None:
    answer = one(service, request(part() + END, f"Content-Type: multipart/form-data{boundary}", path=URL))
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


def test_the_service_is_well_after_all_this(http: httpx.Client) -> None:
    assert http.get("/readyz").status_code == 200
    assert json.loads(http.post("/v1/embeddings", content=TEXT).content)["data"]
