"""Formats structured log lines: human-readable on a terminal, JSON otherwise.

Events and their fields are named by the modules that log them.
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
    """Configures logging to standard error for the whole process. Call once, before the first log line."""
    human = not writes_json(form)
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if human
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _add_logger_name,
            _add_local_time if human else _add_utc_time,
            _drop_empty_fields,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_LoggerFactory(),
        cache_logger_on_first_use=True,
    )


class RequestLines:
    """Writes access-log lines as JSON in batches: at full load, one write per line would be a fifth of the work.

    A line is written within `DELAY_SECONDS`, or when `flush` is called. Keys are the same as in other log lines.
    """

    DELAY_SECONDS = 0.05

    def __init__(self, level: str, write: Callable[[str], object] | None = None) -> None:
        self._min_level = _LEVELS[level]
        self._write_out = write or _to_standard_error
        self._lines: list[bytes] = []

    def __call__(self, level: str, values: dict[str, object]) -> None:
        if _LEVELS[level] < self._min_level:
            return
        values["level"] = level
        values["logger"] = "router.access"
        values["timestamp"] = datetime.now(UTC)
        if not self._lines:
            asyncio.get_running_loop().call_later(self.DELAY_SECONDS, self.flush)
        self._lines.append(msgspec.json.encode(values))

    def flush(self) -> None:
        if self._lines:
            text = b"\n".join(self._lines).decode() + "\n"
            self._lines = []
            self._write_out(text)


def _to_standard_error(text: str) -> None:
    """Drops the text if it cannot be written: a broken pipe or a full disk must not stop the servers."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def writes_json(form: str) -> bool:
    """Returns True if `form` means JSON lines here; `auto` does unless standard error is a terminal."""
    return form == "json" or (form == "auto" and not sys.stderr.isatty())


class _NamedLogger:
    """Writes to standard error; keeps its name for the `logger` field."""

    def __init__(self, name: str) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        _to_standard_error(line + "\n")

    debug = info = warning = error = critical = exception = msg


class _LoggerFactory:
    def __call__(self, *arguments: Any) -> _NamedLogger:
        return _NamedLogger(str(arguments[0]) if arguments else "router")


def _add_logger_name(logger: Any, method: str, values: Any) -> Any:
    del method
    values.setdefault("logger", getattr(logger, "name", "router"))
    return values


def _utc_time() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _add_utc_time(logger: Any, method: str, values: Any) -> Any:
    del logger, method
    values["timestamp"] = _utc_time()
    return values


def _add_local_time(logger: Any, method: str, values: Any) -> Any:
    del logger, method
    values["timestamp"] = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return values


def _drop_empty_fields(logger: Any, method: str, values: Any) -> Any:
    """Drops fields without a value (None or ""), so that a line has no `reason= pid=None`; keeps 0 and False."""
    del logger, method
    return {name: value for name, value in values.items() if value is not None and value != ""}
