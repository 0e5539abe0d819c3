"""Traces for OpenTelemetry. Serve makes a span of each request in each replica and passes the trace on; here is where spans are
sent, and what happens to a request within a replica.

Serve's `tracing_config` in a config file switches all of it on (docs/configuration.md).
"""

from __future__ import annotations

import importlib.util
import os
import time
from typing import TYPE_CHECKING, Any

from loguru import logger
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult

from clipfleet.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

EXPORTERS = ("deployments.tracing:exporters", "deployments.tracing.exporters")  # Serve takes either form
_REQUEST = "replica_handle_request Ingress __call__"  # Serve's name of a request in the ingress


def exporters() -> list[SpanProcessor]:
    """Send spans to the collector that OpenTelemetry's own variables name (OTEL_EXPORTER_OTLP_ENDPOINT and its kin), in the
    background. Serve calls it in each replica."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", "clipfleet")  # read by the provider that Serve makes after this call
    return [BatchSpanProcessor(OTLPSpanExporter())]


def check(exporter: str) -> None:
    """Raise SettingsError for an `exporter_import_path` of this package that replicas could not use.

    Others are the replicas' to import: what is there need not be here.
    """
    where = f"tracing_config.exporter_import_path {exporter!r}"
    if exporter not in EXPORTERS:
        if exporter.startswith("deployments."):
            raise SettingsError(f"{where} is not there; clipfleet's own is {EXPORTERS[0]!r}")
        return
    try:
        installed = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # of a package above it
        installed = None
    if installed is None:
        raise SettingsError(f"{where} needs OTLP's exporter: pip install 'clipfleet[tracing]'")


class _OfRequests(Sampler):
    """Lets nothing but a request in the ingress begin a trace.

    Serve passes on no word of a request that is not sampled, so each call below it, and each probe, would draw lots anew.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *arguments: Any, **options: Any
    ) -> SamplingResult:
        above = trace.get_current_span(parent_context).get_span_context()
        if name != _REQUEST and not above.is_valid:
            return SamplingResult(Decision.DROP)
        return self._sampler.should_sample(parent_context, trace_id, name, *arguments, **options)

    def get_description(self) -> str:
        return f"OfRequests({self._sampler.get_description()})"


def set_up() -> None:
    """In a replica, before its first span: Serve has made its provider of spans by then, if it was told to."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.sampler = _OfRequests(provider.sampler)


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
    try:
        made = trace.get_tracer("clipfleet").start_span(
            span, below, attributes=named, start_time=round((began + since_the_epoch) * 1e9)
        )
        made.end(round((ended + since_the_epoch) * 1e9))
    except Exception as error:  # of somebody's span processor: the request goes on
        logger.warning("a span was lost: {}", error)
