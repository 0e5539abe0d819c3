"""Traces of OpenTelemetry: which spans a request makes, in which replicas, and what joins them."""

from __future__ import annotations

import secrets
import subprocess
import sys

from tests.deployments.collector import Collector, Span
from tests.deployments.processes import until
from tests.deployments.service import Service

IN_REPLICAS = {
    "replica_handle_request Ingress __call__",
    "replica_handle_request ImageDecoder decode",
    "replica_handle_request ImageEncoder encode",
    "replica_handle_request TextEncoder encode",
}
WITHIN = {
    "read the request": "replica_handle_request Ingress __call__",
    "decode an image": "replica_handle_request ImageDecoder decode",
    "wait for the model": "replica_handle_request ImageEncoder encode",
    "forward pass": "replica_handle_request ImageEncoder encode",
}


def ask(service: Service, image: bytes, sampled: bool) -> str:
    """Ask for an image's vector as part of a trace of the client's own. Returns the trace's id."""
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    with service.client(headers={"traceparent": f"00-{trace}-{parent}-{'01' if sampled else '00'}"}) as http:
        answer = http.post("/v1/embeddings/images", files=[("files", ("a", image + secrets.token_bytes(8)))])
        assert answer.status_code == 200
        assert http.post("/v1/embeddings", json={"input": f"a text of {trace}"}).status_code == 200
    return trace


def chain(span: Span, spans: list[Span]) -> list[str]:
    """The names from a span up to the one that the client made."""
    by_id = {found.own: found for found in spans}
    names = [span.name]
    while (parent := by_id.get(span.parent)) is not None:
        names.append(parent.name)
        span = parent
    return names


def test_a_request_of_a_trace_is_followed_through_all_its_replicas(
    other_service: Service, collector: Collector, files: list[bytes]
) -> None:
    trace = ask(other_service, files[0], sampled=True)
    until(lambda: IN_REPLICAS | WITHIN.keys() <= {span.name for span in collector.of(trace)}, 30, "its spans")
    spans = collector.of(trace)
    assert {span.service for span in spans} == {"clipfleet"}
    for name, replica in WITHIN.items():
        span = next(span for span in spans if span.name == name)
        assert replica in chain(span, spans)
        assert chain(span, spans)[-1] == "replica_handle_request Ingress __call__"
        assert 0 <= span.ended - span.began < 60e9 and abs(span.began - spans[0].began) < 60e9
    passed = [span for span in spans if span.name == "forward pass"]
    assert [span.attributes["clipfleet.batch"] for span in passed] == [1, 1]


def test_a_request_that_is_not_sampled_makes_none(
    other_service: Service, collector: Collector, files: list[bytes]
) -> None:
    quiet = ask(other_service, files[1], sampled=False)
    loud = ask(other_service, files[1], sampled=True)
    until(lambda: "forward pass" in {span.name for span in collector.of(loud)}, 30, "those of the one after it")
    assert collector.of(quiet) == []


def test_without_the_exporter_the_start_is_refused() -> None:
    code = """
import sys
sys.modules["opentelemetry.exporter.otlp"] = None
from clipfleet.errors import SettingsError
from deployments.tracing import check_installed
try:
    check_installed()
except SettingsError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'clipfleet[tracing]'" in done.stdout, done.stderr
