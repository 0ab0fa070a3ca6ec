"""How the program's structured log lines are written: for people on a terminal, as JSON otherwise.

Only the form is decided here; every module names its own events and values.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(form: Literal["auto", "human", "json"], level: str) -> None:
    """Sets the form for the whole process; call it once, before anything is written. Lines go to standard error."""
    human = not writes_json(form)
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if human
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _with_logger,
            structlog.processors.TimeStamper(fmt="iso", utc=not human),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_Loggers(),
        cache_logger_on_first_use=True,
    )


class RequestLines:
    """Writes the access log's lines as JSON, some at a time: at full load a line each would be a fifth of the work.

    A line is out within `DELAY_SECONDS`, or when `flush` is called. Its keys are those of every other line.
    """

    DELAY_SECONDS = 0.05

    def __init__(self, level: str, write: Callable[[str], object] | None = None) -> None:
        self._least = _LEVELS[level]
        self._write_out = write or _to_standard_error
        self._lines: list[bytes] = []

    def __call__(self, level: str, values: dict[str, object]) -> None:
        if _LEVELS[level] < self._least:
            return
        values["level"] = level
        values["logger"] = "router.access"
        values["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        if not self._lines:
            asyncio.get_running_loop().call_later(self.DELAY_SECONDS, self.flush)
        self._lines.append(msgspec.json.encode(values))

    def flush(self) -> None:
        if self._lines:
            text = b"\n".join(self._lines).decode() + "\n"
            self._lines = []
            self._write_out(text)


def _to_standard_error(text: str) -> None:
    """A line that cannot be written is dropped: a pipe that nobody reads or a full disk must not end the servers."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def writes_json(form: str) -> bool:
    """Whether lines of that form are JSON."""
    return form == "json" or (form == "auto" and not sys.stderr.isatty())


class _NamedLogger:
    """Writes to standard error, and knows the name that it was asked for by."""

    def __init__(self, name: str) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        _to_standard_error(line + "\n")

    debug = info = warning = error = critical = exception = msg


class _Loggers:
    def __call__(self, *arguments: Any) -> _NamedLogger:
        return _NamedLogger(str(arguments[0]) if arguments else "router")


def _with_logger(logger: Any, method: str, values: Any) -> Any:
    del method
    values.setdefault("logger", getattr(logger, "name", "router"))
    return values
