"""The router is built from one reading of the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.app.hardware import Hardware
from router.app.wiring import build
from router.config.settings import Settings
from router.domain.events import GpusRead
from router.domain.gpu import Gpu
from tests.scheduler.builders import gpu


@dataclass
class Reader:
    reads: int = 0

    def read(self) -> tuple[Gpu, ...]:
        self.reads += 1
        return (gpu(0, 5),)

    def close(self) -> None: ...


async def test_the_router_starts_from_the_reading_that_was_checked_and_reads_no_gpu_itself(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {"state_directory": str(tmp_path), "instances": [{"url": "http://127.0.0.1:9", "gpus": ["0"]}]}
    )
    reader, found = Reader(), gpu(0, 20_000)
    async with build(
        settings, Hardware(reader, (), {}, "", ""), GpusRead((found,), 7.0), None, lambda **_: settings, {}, ()
    ) as router:
        snapshot = router.controller.snapshot()
        assert (snapshot.gpus, snapshot.gpus_read_at, reader.reads) == ({found.uuid: found}, 7.0, 0)
