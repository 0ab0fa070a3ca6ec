"""The same request, straight to a server and through the router: the same status, headers that matter, and bytes.

Every recorded exchange is played to both. Times, durations and ids differ between any two runs and are blotted out;
where no seed fixes the words, their shape is compared. What the router answers otherwise on purpose is listed.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.clients.conftest import Routed
from tests.contract.recording import Recording
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage
from tests.contract.test_recordings import ORDINARY, PREPARE, _for_this_store
from tests.support.rawhttp import Reply, exchange

_OWN_WAY = {
    r".*(model|v1-model)-cloud-suffix": "cloud models are refused by the router itself, with the key that lets them in",
    r".*experimental-web-search": "acts on the server's account: refused with why",
    r".*v1-(messages|responses)(?!-count).*": "an API that the server lacks is named with its version",
    r".*/ps-.*": "rows carry an object of the router's own",
    r".*/(tags|v1-models|accept-gzip)": "the stores' lists differ in their times",
}
"""Recordings whose answers differ on purpose; they are compared in part."""

_BLOTS = (
    (rb'"(created_at|modified_at|expires_at|completed_at)":"[^"]*"', rb'"\1":"<time>"'),
    (rb'"(\w+_duration)":\d+', rb'"\1":<duration>'),
    (rb'"(created|completed_at)":\d+', rb'"\1":<time>'),
    (rb'"(id|item_id|request_id)":"(chatcmpl|cmpl|msg|resp|call|req|rs|fc|item)[_-][^"]*"', rb'"\1":"<id>"'),
    (rb"(/|\\/)[^\s\"]*(/|\\/)(blobs|manifests)(/|\\/)", rb"<models>/\3/"),
    (rb"(lookup \S+ on )[^:\s]+(:\d+)?: .*?(\"|\\n)", rb"\1<resolver>\3"),
)
_MADE_UP = re.compile(rb'"(response|content|thinking|reasoning|text|delta|context|embeddings?|token)":')
_FREE = frozenset({"date", "content-length", "transfer-encoding", "connection", "server", "x-request-id"})
"""Headers that are compared elsewhere or belong to the router; `X-Llamayard-*` too."""


def _blotted(chunk: bytes) -> bytes:
    for pattern, blot in _BLOTS:
        chunk = re.sub(pattern, blot, chunk)
    return chunk


_MANAGED = re.compile(rb"POST /api/(create|pull|push) ")
"""Whose lines may share a chunk where they did not: clients read them by line."""


def _as_compared(recording: Recording, reply: Reply) -> Reply:
    """Without `keep-alive`, which belongs to one connection, and without the borders of chunks where they are free:
    a document is read whole, wherever a long one is cut."""
    kept = tuple(pair for pair in reply.head.headers if pair != ("Connection", "keep-alive"))
    is_document = (reply.header("Content-Type") or "").startswith("application/json")
    is_free = (is_document or _MANAGED.match(recording.request)) and reply.chunks
    return replace(reply, head=replace(reply.head, headers=kept), chunks=(reply.body,) if is_free else reply.chunks)


def _headers(reply: Reply) -> dict[str, str]:
    pairs = ((name.lower(), value) for name, value in reply.head.headers)
    return {name: value for name, value in pairs if name not in _FREE and not name.startswith("x-llamayard-")}


def _own_way(recording: Recording, reply: Reply) -> str | None:
    """Why the router answers otherwise, where it does."""
    for names, why in _OWN_WAY.items():
        if re.fullmatch(names, recording.name):
            return None if "responses" in names and reply.body != b"404 page not found" else why
    return None


async def _answers(recording: Recording, straight: Stage, routed: Routed) -> tuple[Reply, Reply]:
    prepare = PREPARE.get(recording.name.rpartition("/")[2], lambda _: None)
    answers: list[Reply] = []
    for stage in (straight, routed.stage):
        prepare(stage)
        answers.append(await exchange(stage.server.address, _for_this_store(recording, stage)))
    return answers[0], answers[1]


@pytest.mark.parametrize("recording", ORDINARY, ids=[one.name for one in ORDINARY])
async def test_a_request_is_answered_as_a_server_answers_it(
    straight: Stage, routed: Routed, recording: Recording
) -> None:
    plain, through = (_as_compared(recording, reply) for reply in await _answers(recording, straight, routed))
    assert through.end == plain.end
    if _own_way(recording, plain):
        _compare_in_part(recording, plain, through)
        return
    assert (through.status, through.head.reason) == (plain.status, plain.head.reason)
    assert _headers(through) == _headers(plain)
    assert not differences(shape(through), shape(plain))
    is_fixed = b'"seed"' in recording.request or not _MADE_UP.search(plain.body)
    is_fixed = is_fixed and b'"logprobs"' not in recording.request  # floats of a batch
    if is_fixed:
        assert [*map(_blotted, through.chunks)] == [*map(_blotted, plain.chunks)]


def _compare_in_part(recording: Recording, plain: Reply, through: Reply) -> None:
    """Lists have the same shape, but for the router's own object; refusals come in the API's own shape."""
    if through.status == 200:
        own = re.compile(rb',"llamayard":\{[^}]*\}')
        bare = replace(through, chunks=tuple(own.sub(b"", chunk) for chunk in through.chunks))
        lines = differences(shape(bare), shape(plain))
        assert not [line for line in lines if ".headers." not in line]
    else:
        assert through.status in (403, 404)
        assert through.header("X-Llamayard-Error") in ("forbidden", "not_supported")
        assert b'"error"' in through.body
