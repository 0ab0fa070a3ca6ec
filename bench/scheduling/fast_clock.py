"""Runs the unchanged router with a scaled clock: `python -m bench.scheduling.fast_clock 8 rig=4x3090`.

The router's polls, timeouts, half-lives and deadlines are in seconds. Over emulated servers that run eight times as
fast they must be emulated seconds, so this process scales its monotonic clock and its event loop's waits. It uses
asyncio's own loop because uvloop cannot be scaled. The router's CPU work is not scaled, so it weighs SPEED times
as much.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import sys
import time
from collections.abc import Callable

from router.app.serve import serve
from router.config.settings import load_settings

_USAGE = "usage: python -m bench.scheduling.fast_clock SPEED [KEY=VALUE …]"


class FastSelector(selectors.DefaultSelector):
    """A selector that divides every timeout by `speed`."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout if timeout is None or timeout <= 0 else timeout / self._speed)


def scaled(clock: Callable[[], float], speed: float) -> Callable[[], float]:
    """Returns a clock that runs `speed` times as fast from now on."""
    began = clock()
    return lambda: began + (clock() - began) * speed


def main(arguments: list[str]) -> int:
    """Serves with the given settings until it is stopped; no configuration file is read."""
    if not arguments or arguments[0].startswith("-") or any("=" not in pair for pair in arguments[1:]):
        sys.stderr.write(_USAGE + "\n")
        return 2
    speed = float(arguments[0])
    time.monotonic = scaled(time.monotonic, speed)
    flags = dict(pair.split("=", 1) for pair in arguments[1:])
    settings = load_settings(None, dict(os.environ), flags)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(FastSelector(speed))) as runner:
        runner.run(serve(settings, lambda **_: settings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
