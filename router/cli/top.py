"""`llamayard top`: a live view of the running router in a terminal. Where there is no terminal it prints one frame.

Needs nothing but a terminal that moves its cursor, so that it works over ssh. Restores the terminal however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import termios
import textwrap
import tty
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import urlencode

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.explain import render_explanation
from router.cli.reporting import reports_problems
from router.cli.router_client import Refused, RouterClient, StatusError
from router.cli.top_view import View, frame, models_of, moved, names_of, next_sort

_REFRESH_SECONDS = 1.0
_ENTER_SCREEN, _LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_UP, _DOWN, _ENTER = ("k", "\x1b[A", "\x1bOA"), ("j", "\x1b[B", "\x1bOB"), ("\r", "\n")
_QUIT = ("q", "Q", "\x03", "\x04")
_LINES_WITHOUT_TERMINAL = 1000


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the router cannot be asked at the start."""
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    status = client.get("/llamayard/status")
    if arguments.json:
        print(json.dumps(status, indent=2, ensure_ascii=False))
    elif sys.stdin.isatty() and sys.stdout.isatty():
        with _screen():
            _Top(client, status).watch()
    else:
        columns = shutil.get_terminal_size((100, 0)).columns
        print("\n".join(frame(status, View(), columns, _LINES_WITHOUT_TERMINAL)[:-1]))
    return EXIT_OK


@contextlib.contextmanager
def _screen() -> Generator[None]:
    """The other screen of the terminal, with keys that come one by one."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, end)
    try:
        tty.setcbreak(descriptor)
        sys.stdout.write(_ENTER_SCREEN)
        yield
    finally:
        sys.stdout.write(_LEAVE_SCREEN)
        sys.stdout.flush()
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, previous)


class _Top:
    """Reads the status every second, and at once after a key."""

    def __init__(self, client: RouterClient, status: dict[str, Any]) -> None:
        self._client = client
        self._status = status
        self._view = View()
        self._problem = ""

    def watch(self) -> None:
        """Returns when the user quits."""
        while True:
            columns, lines = shutil.get_terminal_size((80, 24))
            shown = frame(self._status, self._view, columns, lines)
            if self._problem:
                shown[-1] = self._problem[:columns]
            _draw(shown)
            key = _key(_REFRESH_SECONDS)
            if key in _QUIT:
                return
            if key:
                self._pressed(key)
            self._read()

    def _read(self) -> None:
        """A router that is down is reported, not fatal."""
        try:
            self._status = self._client.get("/llamayard/status")
            self._problem = ""
        except (StatusError, Refused) as error:
            self._problem = f"llamayard: {error}"

    def _pressed(self, key: str) -> None:
        names = names_of(models_of(self._status, self._view))
        if key in ("s", "S"):
            self._view = next_sort(self._view)
        elif key in _UP or key in _DOWN:
            self._view = moved(self._view, names, 1 if key in _DOWN else -1)
        elif key in _ENTER and names:
            self._explain(self._view.selected if self._view.selected in names else names[0])

    def _explain(self, model: str) -> None:
        try:
            text = render_explanation(self._client.get(f"/llamayard/explain?{urlencode({'model': model})}"))
        except (StatusError, Refused) as error:
            text = f"llamayard: {error}"
        columns, lines = shutil.get_terminal_size((80, 24))
        shown = [part for line in text.splitlines() for part in textwrap.wrap(line, columns) or [""]]
        _draw([*shown[: lines - 1], "any key: back"])
        _key(None)


def _draw(lines: list[str]) -> None:
    body = f"{_CLEAR_LINE}\r\n".join(lines)
    sys.stdout.write(f"{_HOME}{body}{_CLEAR_LINE}{_CLEAR_BELOW}")
    sys.stdout.flush()


def _key(timeout_seconds: float | None) -> str:
    """One key, also one that is sent as several characters; "" if none comes in time."""
    descriptor = sys.stdin.fileno()
    if not select.select([descriptor], [], [], timeout_seconds)[0]:
        return ""
    pressed = os.read(descriptor, 16).decode("utf-8", "replace")
    if not pressed:
        return _QUIT[0]  # the terminal is gone
    return pressed if pressed.startswith("\x1b") else pressed[0]
