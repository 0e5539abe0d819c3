"""A collector of OpenTelemetry's traces on this machine, over HTTP."""

from __future__ import annotations

import gzip
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.deployments.listener import in_thread


@dataclass(frozen=True)
class Span:
    """One span, as it arrived."""

    trace: str
    own: str
    parent: str
    name: str
    service: str
    began: int  # nanoseconds since the epoch
    ended: int
    attributes: dict[str, int | str]


class Collector(ThreadingHTTPServer):
    """Keeps what exporters send to /v1/traces."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.spans: list[Span] = []

    def of(self, trace: str) -> list[Span]:
        return [span for span in list(self.spans) if span.trace == trace]


class _Answer(BaseHTTPRequestHandler):
    server: Collector

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = (entry.value.string_value for entry in sent.resource.attributes if entry.key == "service.name")
            self.server.spans += [
                Span(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    service,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    {entry.key: entry.value.int_value or entry.value.string_value for entry in span.attributes},
                )
                for scope in sent.scope_spans
                for span in scope.spans
            ]
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()


def collecting() -> AbstractContextManager[Collector]:
    return in_thread(Collector())
