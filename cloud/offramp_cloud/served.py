"""What the gateway reports of each request: one line in the log, and numbers for the metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("offramp_cloud.requests")


@dataclass(slots=True)
class Served:
    """One request, filled in while it is served.

    device    common name in the client's certificate, "" without one;  peer  its address
    status    name of the gRPC status
    began_s   on time.monotonic();  ms  from then until its reply was ready
    nbytes, reply_nbytes   of the two messages
    rows, exit_depths, queue_ms, compute_ms   from the reply; zero and empty without one
    """

    request_id: str = ""
    device: str = ""
    peer: str = ""
    bundle: str = ""
    nbytes: int = 0
    reply_nbytes: int = 0
    began_s: float = 0.0
    ms: float = 0.0
    status: str = "CANCELLED"
    message: str = ""
    rows: int = 0
    exit_depths: tuple[int, ...] = ()
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    traceparent: str = ""


Observer = Callable[[Served], None]


def log_served(served: Served) -> None:
    """One line at INFO; the fields are in the record's `fields`, for any formatter."""
    fields: dict[str, Any] = {
        "id": served.request_id,
        "device": served.device,
        "peer": served.peer,
        "bundle": served.bundle,
        "rows": served.rows,
        "bytes": served.nbytes,
        "ms": round(served.ms, 2),
        "queue_ms": round(served.queue_ms, 2),
        "compute_ms": round(served.compute_ms, 2),
        "status": served.status,
        "message": served.message,
        "traceparent": served.traceparent,
    }
    shown = {name: value for name, value in fields.items() if value != ""}
    log.info("request", extra={"fields": shown})


class LineFormatter(logging.Formatter):
    """time level message name=value ...; strings are quoted, so that a stranger's stays in its line."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname.lower()} {record.getMessage()}"
        for name, value in getattr(record, "fields", {}).items():
            line += f" {name}={json.dumps(value)}"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """The same as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)
