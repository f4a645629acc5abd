"""Logs: one JSON object a line on stderr, with the request's id. Code logs by the standard library; structlog renders.

User ids, item ids, bodies, keys and query strings are never logged. An exception may quote what a client sent, so
within a request it is told by its type and its place, and not by its message.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]


def set_up(level: str) -> None:
    """Sends everything at `level` and above to stderr, uvicorn's messages included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


def formatter() -> logging.Formatter:
    """Time, level, logger, message, the request's id where there is one, and the fields of `extra={...}`."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.EventRenamer("message"),
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(),
            _exception,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
    )


def _exception(logger: Any, method: str, event: Event) -> Event:
    event.pop("color_message", None)  # uvicorn says everything twice
    info = event.pop("exc_info", None)
    if info and info[1] is not None:
        # uvicorn reports what a request raised after the request's id is gone.
        quotes_a_client = "request_id" in event or event["logger"].startswith("uvicorn")
        event["exception"] = _places(info[1]) if quotes_a_client else "".join(traceback.format_exception(info[1]))
    return event


def _places(error: BaseException) -> str:
    """The traceback without messages, causes first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    told = ["".join(traceback.format_tb(each.__traceback__)) + type(each).__qualname__ for each in reversed(chain)]
    return "\n\n".join(told)
