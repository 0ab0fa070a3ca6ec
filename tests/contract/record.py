"""Records the exchanges of the 0.24.0 set with the current real server: `python -m tests.contract.record`.

Writes `recordings/VERSION`. Needs `make ollama`. The requests stay as they were recorded first, and each test adapts
them to its own models.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from tests.contract.recording import FOLDER, Recording, recordings_by_title, write_recording
from tests.contract.stage import Stage, create_models
from tests.contract.test_failures import (
    SIGNALS,
    reply_cut_off,
    reply_of_oversized,
    reply_of_queued_request,
    reply_with_killed_runner,
    with_oversized_models,
)
from tests.contract.test_queue import LIMITS, full_queue
from tests.contract.test_recordings import adapted_request, is_ordinary, prepare_for
from tests.support.ollama_server import REAL_VERSION, real_server, write_model_files
from tests.support.rawhttp import Reply, exchange
from tests.support.tiny_model import BIG, EMBED, TINY

_SERVER = f"Ollama {REAL_VERSION} on a CPU, models of tests/support/tiny_model.py"


def _without_paths(reply: Reply, stage: Stage) -> Reply:
    """The reply without the folder of the model store."""
    folder = str(stage.server.models_dir).encode()
    return replace(reply, chunks=tuple(chunk.replace(folder, b"<models>") for chunk in reply.chunks))


async def _replies(by_title: dict[str, Recording], folder: Path) -> AsyncGenerator[tuple[Recording, Reply]]:
    """The server's reply to each request, without paths."""
    files = write_model_files(folder / "weights", {"tiny": TINY, "big": BIG, "embed": EMBED})
    with real_server(folder) as server:
        stage = create_models(server, files)
        for recording in filter(is_ordinary, by_title.values()):
            prepare_for(recording, stage)
            reply = await exchange(server.address, adapted_request(recording, stage))
            yield recording, _without_paths(reply, stage)
        for title, recording in by_title.items():
            if title == "runner-killed-while-waiting":
                yield recording, await reply_of_queued_request(stage, recording)
            elif title.startswith("runner-killed"):
                yield recording, await reply_with_killed_runner(stage, recording)
        with with_oversized_models(stage, folder):
            for title, recording in by_title.items():
                if title.startswith("does-not-fit"):
                    yield recording, _without_paths(await reply_of_oversized(stage, recording), stage)
    for name, signal_number in SIGNALS.items():
        with real_server(folder) as server:
            stage = Stage(server, files)
            stage.load("big")
            recording = by_title[f"server-{name}-generate-stream"]
            yield recording, await reply_cut_off(stage, recording, signal_number)
    with real_server(folder, **LIMITS) as server:
        stage = Stage(server, files)
        async with full_queue(stage):
            for recording in by_title.values():
                if "overload" in recording.name:
                    yield recording, await exchange(server.address, recording.request)


async def _record() -> None:
    target = FOLDER / REAL_VERSION
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        async for recording, reply in _replies(dict(recordings_by_title("0.24.0")), Path(folder)):
            write_recording(target, replace(recording, reply=reply), _SERVER)
            print(reply.status, recording.title)


if __name__ == "__main__":
    asyncio.run(_record())
