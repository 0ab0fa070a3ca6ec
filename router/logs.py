"""How the program's structured log lines are written: for people on a terminal, as JSON otherwise.

Only the form is decided here; every module names its own events and values.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(form: Literal["auto", "human", "json"], level: str) -> None:
    """Sets the form for the whole process; call it once, before anything is written. Lines go to standard error."""
    human = form == "human" or (form == "auto" and sys.stderr.isatty())
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


class _NamedLogger(structlog.PrintLogger):
    """Writes to standard error, and knows the name that it was asked for by."""

    def __init__(self, name: str) -> None:
        super().__init__(sys.stderr)
        self.name = name


class _Loggers:
    def __call__(self, *arguments: Any) -> _NamedLogger:
        return _NamedLogger(str(arguments[0]) if arguments else "router")


def _with_logger(logger: Any, method: str, values: Any) -> Any:
    del method
    values.setdefault("logger", getattr(logger, "name", "router"))
    return values
