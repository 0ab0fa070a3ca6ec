"""Serves with a clock that runs faster: `python -m tests.support.fast_router SPEED serve --config FILE [--rig SPEC]`.

For what the router does only after minutes, over emulated servers that run as fast (`LLAMAYARD_RIG_SPEED`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from bench.scheduling.fast_clock import FastSelector, scaled
from router.app.serve import serve
from router.config.settings import Settings, load_settings


def main(arguments: list[str]) -> None:
    speed, _, _, config, *rig = arguments
    time.monotonic = scaled(time.monotonic, float(speed))

    def read_settings(*, may_be_blank: bool = True) -> Settings:
        flags = {"rig": rig[1]} if rig else {}
        return load_settings(Path(config), dict(os.environ), flags, may_be_blank=may_be_blank)

    selector = FastSelector(float(speed))
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(serve(read_settings(), read_settings))


if __name__ == "__main__":
    main(sys.argv[1:])
