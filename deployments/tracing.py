"""Traces for OpenTelemetry. Serve makes a span of each request in each replica and passes the trace on; here is where spans are
sent, and what happens to a request within a replica.

Serve's `tracing_config` in a config file switches all of it on (docs/configuration.md).
"""

from __future__ import annotations

import importlib.util
import os
import time
from typing import TYPE_CHECKING

from opentelemetry import context, trace

from clipfleet.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

EXPORTERS = "deployments.tracing:exporters"


def exporters() -> list[SpanProcessor]:
    """Send spans to the collector that OpenTelemetry's own variables name (OTEL_EXPORTER_OTLP_ENDPOINT and its kin), in the
    background. Serve calls it in each replica."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "clipfleet")  # read by the provider that Serve makes after this call
    return [BatchSpanProcessor(OTLPSpanExporter())]


def check_installed() -> None:
    """Raise SettingsError where the package is missing that `exporters` needs."""
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # of a package above it
        found = None
    if found is None:
        raise SettingsError(f"tracing_config with {EXPORTERS} needs OTLP's exporter: pip install 'clipfleet[tracing]'")


def here() -> Context | None:
    """What spans of the current request belong below; None where it is not traced."""
    return context.get_current() if trace.get_current_span().is_recording() else None


def name() -> dict[str, str]:
    """The id of the current trace, for the log; empty where the request is not traced."""
    span = trace.get_current_span()
    return {"trace": f"{span.get_span_context().trace_id:032x}"} if span.is_recording() else {}


def record(span: str, below: Context | None, began: float, ended: float, **attributes: str | int) -> None:
    """A span that is over, with times of time.monotonic(); its attributes get the prefix `clipfleet.`. Nothing where `below` is
    None."""
    if below is None:
        return
    since_the_epoch = time.time() - time.monotonic()
    named = {f"clipfleet.{key}": value for key, value in attributes.items()}
    made = trace.get_tracer("clipfleet").start_span(
        span, below, attributes=named, start_time=round((began + since_the_epoch) * 1e9)
    )
    made.end(round((ended + since_the_epoch) * 1e9))
