"""Usage is written at the end of the run, and a database that fails is reported once."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from router.app.usage import UsageRecorder, recorded_usage, recording, today
from router.config.settings import ConfigError, Settings
from router.domain.instance import InstanceName
from router.domain.snapshot import Snapshot
from router.observability.usage_log import FinishedRequest, UsageLog
from router.storage.usage_store import UsageStore
from tests.scheduler.builders import snapshot, view

GPU0 = InstanceName("gpu0")
ASKED = FinishedRequest("user:ann", "tiny", GPU0, 0.0, 2.0, 3, 10)


class _Controller:
    """One GPU on which nothing runs any more."""

    def now(self) -> float:
        return 10.0

    def snapshot(self) -> Snapshot:
        return snapshot((), (view("gpu0", 0),))

    def running(self) -> list[tuple[InstanceName, float]]:
        return []


async def test_what_is_left_is_written_at_the_end(tmp_path: Path) -> None:
    settings, log = Settings(state_directory=tmp_path), UsageLog()
    async with recording(settings, log, _Controller()):
        log.record(ASKED)
        assert recorded_usage(settings, today()) == []
    (row,) = recorded_usage(settings, today())
    assert (row.client, row.model, row.totals) == ("user:ann", "tiny", (1, 3, 10, 2.0, 0.0))


async def test_an_error_in_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such GPU"):
        async with recording(Settings(state_directory=tmp_path), UsageLog(), _Controller()):
            raise ConfigError(["no such GPU"])


async def test_a_database_that_fails_is_logged_once_until_it_works_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.write_text("in the way", encoding="utf-8")
    log, store = UsageLog(), UsageStore(folder / "usage.sqlite", 30)
    recorder = UsageRecorder(log, store, _Controller())
    with capture_logs() as lines:
        for _ in range(3):
            log.record(ASKED)
            await recorder.flush()
        folder.unlink()
        log.record(ASKED)
        await recorder.flush()
    store.close()
    assert [line["event"] for line in lines] == ["usage_not_written", "usage_written_again"]
    (row,) = recorded_usage(Settings(state_directory=folder), today())
    assert row.totals.requests == 4
