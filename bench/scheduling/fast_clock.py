"""The router itself, unchanged, in a clock that runs fast: `python -m bench.scheduling.fast_clock 8 rig=4x3090`.

All that it waits for and measures, its polls, patience, half-lives and deadlines, is in seconds; over emulated servers
that run eight times as fast they must be emulated seconds, or another router would be measured. So this process's
monotonic clock and the waiting of its event loop are scaled. It runs asyncio's own loop, not uvloop, which cannot be
scaled; the router's own work is not made faster, so it weighs SPEED times as much as in truth.
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
    """Waits so many times less than it is told to."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout if timeout is None or timeout <= 0 else timeout / self._speed)


def scaled(clock: Callable[[], float], speed: float) -> Callable[[], float]:
    """The clock, running so many times as fast from now on."""
    began = clock()
    return lambda: began + (clock() - began) * speed


def main(arguments: list[str]) -> int:
    """Serves with the settings that are given, and no others, until it is told to stop."""
    if not arguments or any("=" not in pair for pair in arguments[1:]):
        sys.stderr.write(_USAGE + "\n")
        return 2
    speed = float(arguments[0])
    time.monotonic = scaled(time.monotonic, speed)
    flags = dict(pair.split("=", 1) for pair in arguments[1:])
    settings = load_settings(None, dict(os.environ), flags)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(FastSelector(speed))) as runner:
        runner.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
