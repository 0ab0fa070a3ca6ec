"""The same request directly to a server and through the router: the same status, relevant headers and bytes.

Every recorded exchange is sent to both. Times, durations and ids vary between runs and are masked; without a seed only
the shape of generated text is compared. Intended differences are listed.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.clients.conftest import Routed
from tests.contract.recording import Recording
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage
from tests.contract.test_recordings import ORDINARY, adapted_request, prepare_for
from tests.support.rawhttp import Reply, exchange

_CUT_SHORT = r".*/repeat-limit-.*-stream"
_END_MARK = re.compile(rb'"done":true|\[DONE\]')
_INTENDED_DIFFERENCES = {
    r".*(model|v1-model)-cloud-suffix": "the router refuses cloud models and names the setting that allows them",
    r".*experimental-web-search": "uses the server's account: refused with the reason",
    r".*v1-(messages|responses)(?!-count).*": "the error for a missing API names the server's version",
    _CUT_SHORT: "a stream that its server ends without an end mark ends with an error",
    r".*/(first-)?ps-.*": "entries have an additional object of the router",
    r".*/(first-)?(tags|v1-models|accept-gzip)": "the lists of the two stores differ in times",
}
"""Recordings with intended differences; compared only in part."""

_MASKS = (
    (rb'"(created_at|modified_at|expires_at|completed_at)":"[^"]*"', rb'"\1":"<time>"'),
    (rb'"(\w+_duration)":\d+', rb'"\1":<duration>'),
    (rb'"(created|completed_at)":\d+', rb'"\1":<time>'),
    (rb'"(prompt_eval_cached_count|cached_tokens|cache_read_input_tokens)":\d+', rb'"\1":<tokens>'),
    (rb'"(id|item_id|request_id)":"(chatcmpl|cmpl|msg|resp|call|req|rs|fc|item)[_-][^"]*"', rb'"\1":"<id>"'),
    (rb"(/|\\/)[^\s\"]*(/|\\/)(blobs|manifests)(/|\\/)", rb"<models>/\3/"),
    (rb"(lookup \S+ on )[^:\s]+(:\d+)?: .*?(\"|\\n)", rb"\1<resolver>\3"),
)
_GENERATED = re.compile(rb'"(response|content|thinking|reasoning|text|delta|context|embeddings?|token)":')
_IGNORED_HEADERS = frozenset(
    {"date", "content-length", "transfer-encoding", "connection", "server", "x-accel-buffering", "x-request-id"}
)
"""Headers that are compared elsewhere or added by the router, like `X-Llamayard-*`."""


def _masked(chunk: bytes) -> bytes:
    for pattern, mask in _MASKS:
        chunk = re.sub(pattern, mask, chunk)
    return chunk


_UNMARKED_STREAM = re.compile(r"0\.24\.0/repeat-limit-.*-stream")
"""Streams that a server ends without an end mark: the router adds an error."""
_PROGRESS_REQUEST = re.compile(rb"POST /api/(create|pull|push) ")
"""Requests whose response lines may be chunked differently: clients read them by line."""


def _comparable(recording: Recording, reply: Reply) -> Reply:
    """The comparable part of a response.

    Drops `Connection: keep-alive`, which belongs to one connection, and chunk boundaries where clients ignore them.
    """
    kept = tuple(pair for pair in reply.head.headers if pair != ("Connection", "keep-alive"))
    is_document = (reply.header("Content-Type") or "").startswith("application/json")
    ignores_chunks = (is_document or _PROGRESS_REQUEST.match(recording.request)) and reply.chunks
    return replace(
        reply, head=replace(reply.head, headers=kept), chunks=(reply.body,) if ignores_chunks else reply.chunks
    )


def _headers(reply: Reply) -> dict[str, str]:
    pairs = ((name.lower(), value) for name, value in reply.head.headers)
    return {
        name: value for name, value in pairs if name not in _IGNORED_HEADERS and not name.startswith("x-llamayard-")
    }


def _intended_difference(recording: Recording, reply: Reply) -> str | None:
    """The reason for an intended difference, or None."""
    for names, reason in _INTENDED_DIFFERENCES.items():
        if re.fullmatch(names, recording.name):
            if names == _CUT_SHORT:
                return None if _END_MARK.search(reply.body) else reason
            return None if "responses" in names and reply.body != b"404 page not found" else reason
    return None


async def _answers(recording: Recording, direct: Stage, routed: Routed) -> tuple[Reply, Reply]:
    answers: list[Reply] = []
    for stage in (direct, routed.stage):
        prepare_for(recording, stage)
        answers.append(await exchange(stage.server.address, adapted_request(recording, stage)))
    return answers[0], answers[1]


@pytest.mark.parametrize("recording", ORDINARY, ids=[recording.name for recording in ORDINARY])
async def test_the_router_answers_as_the_server_does(direct: Stage, routed: Routed, recording: Recording) -> None:
    direct_reply, routed_reply = (_comparable(recording, reply) for reply in await _answers(recording, direct, routed))
    assert routed_reply.end == direct_reply.end
    if _intended_difference(recording, direct_reply):
        _compare_in_part(recording, direct_reply, routed_reply)
        return
    assert (routed_reply.status, routed_reply.head.reason) == (direct_reply.status, direct_reply.head.reason)
    assert _headers(routed_reply) == _headers(direct_reply)
    if _UNMARKED_STREAM.fullmatch(recording.name):
        assert b'"error":' in routed_reply.chunks[-1]
        routed_reply = replace(routed_reply, chunks=routed_reply.chunks[:-1])
    assert not differences(shape(routed_reply), shape(direct_reply))
    is_deterministic = b'"seed"' in recording.request or not _GENERATED.search(direct_reply.body)
    is_deterministic = is_deterministic and b'"logprobs"' not in recording.request  # floats vary with the batch
    if is_deterministic:
        assert [*map(_masked, routed_reply.chunks)] == [*map(_masked, direct_reply.chunks)]


def _compare_in_part(recording: Recording, direct_reply: Reply, routed_reply: Reply) -> None:
    """Lists have the same shape except for the router's additional object; errors have the API's format."""
    if re.fullmatch(_CUT_SHORT, recording.name):
        *chunks, error = routed_reply.chunks
        assert b'"error"' in error
        assert not differences(shape(replace(routed_reply, chunks=tuple(chunks))), shape(direct_reply))
    elif routed_reply.status == 200:
        router_object = re.compile(rb',"llamayard":\{[^}]*\}')
        without_router_object = replace(
            routed_reply, chunks=tuple(router_object.sub(b"", chunk) for chunk in routed_reply.chunks)
        )
        lines = differences(shape(without_router_object), shape(direct_reply))
        assert not [line for line in lines if ".headers." not in line]
    else:
        assert routed_reply.status in (403, 404)
        assert routed_reply.header("X-Llamayard-Error") in ("forbidden", "not_supported")
        assert b'"error"' in routed_reply.body
