"""OpenTelemetry: a span for each task, and one below it for each operation. Where it is wanted only, else at no cost.

`OTEL_EXPORTER_OTLP_ENDPOINT` says where spans go; other variables of OpenTelemetry's hold as well.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from atoll import __version__
from atoll.model.operation import Operation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

WANTED = "OTEL_EXPORTER_OTLP_ENDPOINT"
_log = logging.getLogger("atoll.agent")
_tracer: "Tracer | None" = None


@contextlib.contextmanager
def exported() -> Iterator[None]:
    """Within, spans are made and sent, if they are wanted."""
    global _tracer
    provider = _provider() if os.environ.get(WANTED) else None
    if provider is None:
        yield
        return
    _tracer = provider.get_tracer("atoll", __version__)
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


def _provider() -> "TracerProvider | None":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("no traces are sent: %s is set, but `pip install 'atoll[otel]'` wasn't done", WANTED)
        return None
    name = os.environ.get("OTEL_SERVICE_NAME", "atoll")
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


@contextlib.contextmanager
def of_task(call: str, **attributes: str) -> Iterator[None]:
    """What is done within is one task."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(call, attributes={f"atoll.{name}": told for name, told in attributes.items()}):
        yield


def of_operation(operation: Operation) -> None:
    """One that has ended, below the task that it is a part of."""
    if _tracer is None:
        return
    from opentelemetry.trace import Status, StatusCode

    span = _tracer.start_span(
        operation.verb,
        start_time=_nanoseconds(operation.created_at),
        attributes={
            "atoll.operation": operation.id,
            "atoll.subject": operation.subject_name,
            "atoll.state": operation.state,
        },
    )
    if operation.state != "done":
        span.set_status(Status(StatusCode.ERROR, operation.error or operation.state))
    span.end(_nanoseconds(operation.finished_at) if operation.finished_at is not None else None)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
