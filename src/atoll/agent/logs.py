"""The agent's log on standard error, as text or as a line of JSON for each entry, with the task that it is about."""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

import msgspec

Format = Literal["text", "json"]
about: ContextVar[dict[str, str]] = ContextVar("about", default={})  # noqa: B039 - nobody changes it
"""What is worked on: the task's id, its call, and who asked."""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **about.get(),
        }
        if (operation := getattr(record, "operation", None)) is not None:
            entry["operation"] = operation
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = " ".join(f"{name}={value}" for name, value in about.get().items())
        return f"{super().format(record)} {told}".rstrip()


def configure(kind: Format) -> None:
    """All that is logged from now on goes to standard error, in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if kind == "json" else _Text("%(levelname)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("atoll").setLevel(logging.INFO if kind == "json" else logging.WARNING)
