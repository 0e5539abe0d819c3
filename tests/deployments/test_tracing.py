"""Traces of OpenTelemetry: which spans a request makes, in which replicas, and what joins them."""

from __future__ import annotations

import secrets
import subprocess
import sys

import yaml

from tests.deployments.collector import Collector, Span
from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service

REQUEST = "replica_handle_request Ingress __call__"
IN_REPLICAS = {
    REQUEST,
    "replica_handle_request ImageDecoder decode",
    "replica_handle_request ImageEncoder encode",
    "replica_handle_request TextEncoder encode",
}
WITHIN = {
    "read the request": REQUEST,
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
    until(lambda: len([span for span in collector.of(trace) if span.name == "forward pass"]) == 2, 30, "both passes")
    until(lambda: len([span for span in collector.of(trace) if span.name == REQUEST]) == 2, 30, "both requests")
    spans = collector.of(trace)
    assert {span.service for span in spans} == {"clipfleet"}
    for name, replica in WITHIN.items():
        chains = [chain(span, spans) for span in spans if span.name == name]
        assert any(replica in found for found in chains) and {found[-1] for found in chains} == {REQUEST}
    for span in spans:
        assert 0 <= span.ended - span.began < 60e9 and abs(span.began - spans[0].began) < 60e9
        assert span.name != "forward pass" or span.attributes["clipfleet.batch"] in (
            1,
            2,
        )  # a probe may have come along


def test_a_request_that_is_not_to_be_followed_makes_no_span(
    other_service: Service, collector: Collector, files: list[bytes]
) -> None:
    quiet = ask(other_service, files[1], sampled=False)
    loud = ask(other_service, files[1], sampled=True)
    until(lambda: IN_REPLICAS | WITHIN.keys() <= {span.name for span in collector.of(loud)}, 30, "those after it")
    assert collector.of(quiet) == []
    # Nor pieces of it, or of probes, as traces of their own.
    assert {span.name for span in list(collector.spans) if not span.parent} <= {REQUEST}


def test_without_the_exporter_the_start_is_refused() -> None:
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["tracing_config"] = {"enabled": True, "exporter_import_path": "deployments.tracing:exporters"}
    code = f"""
import sys
sys.modules["opentelemetry.exporter.otlp"] = None
from clipfleet.errors import SettingsError
from deployments.deploying import schema_of
try:
    schema_of({config!r})
except SettingsError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'clipfleet[tracing]'" in done.stdout, done.stderr


def test_what_the_log_says_and_what_a_broken_processor_does() -> None:
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from deployments import tracing

class Broken(SpanProcessor):
    def on_end(self, span):
        raise OSError("no room")

trace.set_tracer_provider(TracerProvider())
tracing.set_up()
assert tracing.name() == {} and tracing.here() is None
with trace.get_tracer("t").start_as_current_span("a probe"):
    assert tracing.here() is None, "only a request begins a trace"
with trace.get_tracer("t").start_as_current_span("replica_handle_request Ingress __call__") as span:
    assert tracing.name() == {"trace": format(span.get_span_context().trace_id, "032x")}
    below = tracing.here()
trace.get_tracer_provider().add_span_processor(Broken())
tracing.record("forward pass", below, 1.0, 2.0, batch=3)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "went on\n" and "a span was lost: no room" in done.stderr, done.stderr
