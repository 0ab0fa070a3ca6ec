"""Which requests are kept waiting, with which bytes, and how they learn of an error that comes late."""

from __future__ import annotations

import json

import pytest

from router.errors import LoadFailed
from router.llm_api.body_reader import ParsedBody
from router.llm_api.heartbeat_format import Heartbeat, heartbeat_for, refusal
from router.scheduler.queue.wait_estimate import WaitEstimate

_STREAM, _ONCE = ParsedBody(model="m", stream=True), ParsedBody(model="m", stream=False)
_ERROR = LoadFailed("it <failed>")


def beat(
    path: str,
    seen: ParsedBody = _STREAM,
    header: str | None = None,
    seconds: float | None = 10.0,
    progress: str | None = None,
) -> Heartbeat | None:
    headers = {"x-llamayard-heartbeat": header, "x-llamayard-progress": progress}
    return heartbeat_for(path, seen, headers.get, seconds)


@pytest.mark.parametrize(
    ("path", "content_type", "piece"),
    [
        ("/api/generate", "application/x-ndjson", b" "),
        ("/api/chat", "application/x-ndjson", b" "),
        ("/v1/chat/completions", "text/event-stream", b": waiting\n\n"),
        ("/v1/completions", "text/event-stream", b": waiting\n\n"),
        ("/v1/responses", "text/event-stream", b": waiting\n\n"),
        ("/v1/messages", "text/event-stream", b'event: ping\ndata: {"type": "ping"}\n\n'),
    ],
)
def test_a_stream_is_kept_with_what_its_protocol_ignores(path: str, content_type: str, piece: bytes) -> None:
    kept = beat(path)
    assert kept is not None
    assert (kept.content_type, kept.piece, kept.seconds) == (content_type, piece, 10.0)
    assert ("Content-Type", content_type) in kept.headers


def test_ollamas_own_requests_stream_unless_they_say_otherwise() -> None:
    assert beat("/api/chat", ParsedBody(model="m")) is not None
    assert beat("/v1/chat/completions", ParsedBody(model="m")) is None


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_what_wants_one_object_is_left_alone(path: str) -> None:
    assert beat(path, _ONCE) is None


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings", "/v1/images/generations"])
def test_what_does_not_stream_is_left_alone(path: str) -> None:
    assert beat(path) is None


@pytest.mark.parametrize("word", ["off", "OFF ", "0", "no", "false"])
def test_a_client_can_do_without(word: str) -> None:
    assert beat("/api/chat", header=word) is None
    assert beat("/api/chat", header="on") is not None
    assert beat("/api/chat", seconds=None) is None


def test_a_load_alone_stays_one_object() -> None:
    kept = beat("/api/generate", ParsedBody(model="m", is_load_only=True))
    assert kept is not None
    assert kept.content_type == "application/json; charset=utf-8"
    body = kept.piece * 3 + kept.late_error(_ERROR)
    assert json.loads(body) == {"error": "it <failed>"}


def test_a_late_error_is_a_line_of_ndjson_after_the_blanks() -> None:
    kept = beat("/api/chat")
    assert kept is not None
    (line,) = (kept.piece * 3 + kept.late_error(_ERROR)).splitlines()
    assert json.loads(line) == {"error": "it <failed>"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_late_error_is_an_event_of_its_own(path: str) -> None:
    kept = beat(path)
    assert kept is not None
    events = (kept.piece * 2 + kept.late_error(_ERROR)).split(b"\n\n")
    assert events[-1] == b""
    last = events[-2].decode().split("\n")
    assert json.loads(last[-1].removeprefix("data: "))["error"]["message"] == "it <failed>"
    assert (last[0] == "event: error") is (path == "/v1/messages")


@pytest.mark.parametrize(
    ("path", "seconds", "told"),
    [
        ("/v1/chat/completions", 11.2, b": llamayard position=2 expected_wait_seconds=12 reason=a b c\n\n"),
        ("/v1/responses", None, b": llamayard position=2 reason=a b c\n\n"),
        (
            "/v1/messages",
            0.0,
            b': llamayard position=2 expected_wait_seconds=0 reason=a b c\nevent: ping\ndata: {"type": "ping"}\n\n',
        ),
    ],
)
def test_an_event_stream_that_asks_is_told_in_a_comment(path: str, seconds: float | None, told: bytes) -> None:
    kept = beat(path, progress="1")
    assert kept is not None
    assert (kept.reports_progress, kept.seconds) == (True, 2.0)
    assert kept.progress_piece(WaitEstimate(2, seconds, "a\r\nb\n\nc")) == told


def test_nobody_is_told_who_does_not_ask_or_has_no_place_for_it() -> None:
    for kept in (beat("/v1/messages"), beat("/v1/messages", progress=" Off"), beat("/api/chat", progress="1")):
        assert kept is not None
        assert (kept.reports_progress, kept.seconds) == (False, 10.0)
    assert beat("/v1/messages", header="off", progress="1") is None
    assert beat("/v1/messages", seconds=None, progress="1") is None
    often = beat("/v1/messages", seconds=0.5, progress="1")
    assert often is not None
    assert often.seconds == 0.5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error":"model is gone"}', "model is gone"),
        (b'{"error":{"message":"model is gone","type":"api_error"}}', "model is gone"),
        (b"404 page not found", "404 page not found"),
        (b"", "the server responded with status 404"),
        (b'{"error":7}', '{"error":7}'),
    ],
)
def test_a_servers_late_refusal_keeps_its_words_and_status(body: bytes, words: str) -> None:
    error = refusal(404, body)
    assert (error.status, error.message) == (404, words)
