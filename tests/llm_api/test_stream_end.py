"""What the last bytes of a stream say about how it ended, against recorded streams of real servers."""

from __future__ import annotations

import pytest

from router.llm_api.stream_end import TAIL_BYTES, StreamEnd, Tokens, end_of_stream, tokens_of
from tests.contract.recording import Recording, recordings

_PATHS = frozenset(
    ("/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
)


def _path(recording: Recording) -> str:
    return recording.request.split(b" ")[1].decode()


def _is_stream(recording: Recording) -> bool:
    content_type = recording.reply.header("Content-Type") or ""
    is_stream = content_type.startswith(("application/x-ndjson", "text/event-stream"))
    return (
        recording.reply.status == 200 and is_stream and recording.reply.end == "complete" and _path(recording) in _PATHS
    )


_STREAMS = [recording for recording in recordings() if _is_stream(recording)]
_UNMARKED = ("repeat-limit", "runner-killed-v1")


@pytest.mark.parametrize("recording", _STREAMS, ids=lambda r: r.name)
def test_recorded_streams_end_as_they_were_seen_to(recording: Recording) -> None:
    name = recording.name.partition("/")[2]
    expected = StreamEnd.COMPLETE
    if name.startswith(_UNMARKED):
        expected = StreamEnd.MISSING
    elif name.startswith("runner-killed"):
        expected = StreamEnd.ERROR
    assert end_of_stream(_path(recording), recording.reply.body[-TAIL_BYTES:]) is expected


@pytest.mark.parametrize(
    ("path", "tail", "expected"),
    [
        ("/api/generate", b'1,2,3],"total_duration":7,"eval_count":2}\n', StreamEnd.COMPLETE),
        ("/api/chat", b'{"message":{"content":"\\"done\\":true"},"done":false}\n', StreamEnd.MISSING),
        ("/api/chat", b'{"message":{"tool_calls":[{"arguments":{"done":true}}]},"done":false}\n', StreamEnd.MISSING),
        ("/api/chat", b'{"done":false}\n{"error":"boom"}\n', StreamEnd.ERROR),
        ("/api/chat", b"", StreamEnd.MISSING),
        ("/v1/chat/completions", b'data: {"content":"\\n\\ndata: [DONE]"}\n\n', StreamEnd.MISSING),
        ("/v1/chat/completions", b'data: {"a":1}\r\n\r\ndata: [DONE]\r\n\r\n', StreamEnd.COMPLETE),
        ("/v1/completions", b'data: {"error":{"message":"boom"}}\n\n', StreamEnd.ERROR),
        ("/v1/messages", b'event: error\ndata: {"type":"error"}\n\n', StreamEnd.ERROR),
        ("/v1/messages", b'event: message_delta\ndata: {"text":"event: message_stop"}\n\n', StreamEnd.MISSING),
        ("/v1/responses", b'x"}]},"sequence_number":10,"type":"response.completed"}\n\n', StreamEnd.COMPLETE),
        ("/v1/responses", b'event: response.failed\ndata: {"type":"response.failed"}\n\n', StreamEnd.ERROR),
        ("/v1/responses", b'event: response.output_text.done\ndata: {"text":"a"}\n\n', StreamEnd.MISSING),
        ("/v1/audio/transcriptions", b"data: whatever\n\n", StreamEnd.COMPLETE),
    ],
)
def test_only_the_protocols_own_mark_counts(path: str, tail: bytes, expected: StreamEnd) -> None:
    assert end_of_stream(path, tail) is expected


def test_cached_tokens_of_anthropics_api_belong_to_the_prompt() -> None:
    cached = b'"cache_creation_input_tokens":20,"cache_read_input_tokens":1000'
    usage = b'{"usage":{"input_tokens":3,%s,"output_tokens":7}}' % cached
    assert tokens_of(usage) == Tokens(1023, 7)
