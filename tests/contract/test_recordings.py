"""Replays the recorded exchanges and compares the shapes of the responses with those of the recorded server."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.contract.differences import KNOWN_DIFFERENCES, OTHER_MODEL, RUN, unexplained
from tests.contract.recording import Recording, recordings, recordings_by_title
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage
from tests.support.rawhttp import exchange

_HELLO = "sha256:e997afd18e5f6be004fc193aed2c90291e68ab2c7599a62538c935b7fca6ab0f"
_TINY = "sha256:cf7b4539f0228c4c037bf17f3c29c687b204885f22baf4546fd1eb22c8615179"
"""Digests in recorded requests: of the bytes `hello blob`, and of the chat model used for the recordings."""

_SEPARATE_TEST = re.compile(r"overload|runner-killed|server-sig|does-not-fit|no-network|pull-offline")


def is_ordinary(recording: Recording) -> bool:
    """Whether the exchange needs no more than what `PREPARE` does."""
    return not _SEPARATE_TEST.search(recording.name) and recording.name not in OTHER_MODEL


ORDINARY = [recording for recording in recordings("0.34.0") if is_ordinary(recording)]

Prepare = Callable[[Stage], object]


def _only(*names: str, **fields: object) -> Prepare:
    """Loads exactly these models."""

    def prepare(stage: Stage) -> None:
        stage.unload_all()
        for name in names:
            stage.load(name, **fields)

    return prepare


PREPARE: dict[str, Prepare] = {
    "blob-post": lambda stage: stage.remove_blob(_HELLO),
    "blob-post-again": lambda stage: stage.server.call("POST", f"/api/blobs/{_HELLO}", b"hello blob"),
    "delete": lambda stage: (stage.copy("tiny", "tiny6"), stage.copy("tiny", "tiny-copy")),
    "delete-unknown": lambda stage: (stage.ensure_absent("tiny6"), stage.ensure_absent("tiny-copy")),
    "chat-format-schema": _only("tooly"),  # from 0.30 a runner loaded for a model without a template refuses schemas
    "chat-unload": _only("tiny"),
    "generate-cold-stream": _only(),
    "generate-unload": _only("tiny"),
    "generate-unload-when-not-loaded": _only(),
    "ps-empty": _only(),
    "ps-after-keepalive-0": _only(),
    "ps-after-unload": _only(),
    "ps-loaded": _only("tiny"),
    "ps-5m": _only("tiny", keep_alive="5m"),
    "ps-90s": _only("tiny", keep_alive=90),
    "ps-forever": _only("tiny", keep_alive=-1),
    "ps-three": _only("embed", "tooly"),
    "repeat-limit-chat-once": _only("tooly"),
    "repeat-limit-chat-stream": _only("tooly"),
    "repeat-limit-v1-chat-stream": _only("tooly"),
    "create-files-stream": lambda stage: stage.ensure_absent("tiny3"),
    "create-once": lambda stage: stage.ensure_absent("tiny4"),
    "create-from": lambda stage: stage.post(
        "/api/create", {"model": "tiny-sys", "from": "tiny", "system": "be brief", "stream": False}
    ),
    "create-template-stream": lambda stage: stage.ensure_absent("tooly"),
}


def prepare_for(recording: Recording, stage: Stage) -> None:
    """Brings the server into the state in which the request was recorded."""
    PREPARE.get(recording.exchange, lambda _: None)(stage)


def adapted_request(recording: Recording, stage: Stage) -> bytes:
    """The request with the digest of our weights and a stop sequence that our model generates."""
    request = recording.request.replace(_TINY.encode(), stage.files["tiny"].digest.encode())
    if recording.exchange == "generate-stop-word":
        options = {"num_predict": 3, "seed": 1}
        generated = stage.post(
            "/api/generate", {"model": "tiny", "prompt": "hello", "stream": False, "options": options}
        )
        request = request.replace(b"difu", generated["response"].split()[2].encode())
        head, _, body = request.partition(b"\r\n\r\n")
        request = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head) + b"\r\n\r\n" + body
    return request


@pytest.mark.parametrize("title", [recording.title for recording in ORDINARY])
async def test_a_recorded_request_is_answered_as_recorded(stage: Stage, title: str) -> None:
    recording = recordings_by_title(stage.server.version)[title]
    prepare_for(recording, stage)
    reply = await exchange(stage.server.address, adapted_request(recording, stage))
    known_differences = RUN + KNOWN_DIFFERENCES[stage.server.version]
    unexplained_differences = unexplained(
        recording.name, differences(shape(reply), shape(recording.reply)), known_differences
    )
    assert not unexplained_differences
