"""What came of a request before is good for the next one only where it would come out the same."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.domain.model import BlobDigest
from router.domain.request import Ticket, TicketId
from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import substitutes
from tests.proxy.stage import MODEL
from tests.proxy.wire import URL, Bench

_BYTES = 600
_HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def _request(path: bytes, members: dict[str, object], *, compact: bool = False) -> bytes:
    """All of the same length, so that all heads are the same."""
    separators = (",", ":") if compact else None
    short = json.dumps({**members, "user": ""}, separators=separators).encode()
    body = json.dumps({**members, "user": "x" * (_BYTES - len(short))}, separators=separators).encode()
    assert len(body) == _BYTES
    return _HEAD % (path, _BYTES) + body


def _asked(bench: Bench, request: bytes) -> tuple[Ticket | None, bytes]:
    """The ticket without what differs from one request to the next, and what the server got."""
    before, sent = len(bench.controller.tickets), len(bench.to_server.out)
    bench.ask([request])
    got = bytes(bench.to_server.out[sent:])
    if got:
        bench.answer([_ANSWER])
    tickets = bench.controller.tickets[before:]
    return (replace(tickets[0], id=TicketId(0), arrived_at=0.0, deadline=0.0, request_id="") if tickets else None), got


_MESSAGES = ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "x" * 99}], [])
_OPTIONS = ({"num_ctx": 512}, {"num_ctx": 4096, "num_predict": 9}, {"num_gpu": 1}, {"temperature": 0.5}, {})
_MEMBERS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(("tiny", "tiny", "other")),
        "messages": st.sampled_from(_MESSAGES),
        "prompt": st.sampled_from(("hi", "y" * 80, "")),
    },
    optional={
        "stream": st.just(True),
        "keep_alive": st.sampled_from((-1, "5m", 30, 0, None)),
        "options": st.sampled_from(_OPTIONS),
        "max_tokens": st.sampled_from((1, 7)),
    },
)
_PATHS = st.sampled_from((b"/api/chat", b"/api/generate", b"/v1/chat/completions", b"/api/embed"))


@given(_PATHS, st.lists(_MEMBERS, min_size=2, max_size=8), st.booleans())
@settings(max_examples=300)
def test_a_request_asks_for_the_same_whatever_came_before_it(
    path: bytes, bodies: list[dict[str, object]], compact: bool
) -> None:
    async def check() -> None:
        bench = _bench()
        for members in bodies:
            request = _request(path, members, compact=compact)
            assert _asked(bench, request) == _asked(_bench(), request)

    asyncio.run(check())


def _bench() -> Bench:
    bench = Bench()
    bench.catalog.models["other"] = replace(MODEL, name="other:latest", blob=BlobDigest("o"), context_length=64)
    return bench


_PLAIN = _request(b"/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})


def test_a_model_that_has_changed_is_looked_at_anew() -> None:
    async def check() -> None:
        bench = Bench()
        before, _ = _asked(bench, _PLAIN)
        bench.catalog.models["tiny"] = changed = replace(MODEL, blob=BlobDigest("new"))
        after, _ = _asked(bench, _PLAIN)
        assert before is not None
        assert after is not None
        assert (before.model, after.model) == (MODEL, changed)

    asyncio.run(check())


def test_a_model_that_is_being_deleted_is_refused_though_it_was_served_before() -> None:
    async def check() -> None:
        removing = set[str]()
        bench = Bench(rules=ModelRules(8192, removing=removing))
        assert _asked(bench, _PLAIN)[0] is not None
        removing.add(MODEL.name)
        assert _asked(bench, _PLAIN) == (None, b"")
        assert b"being deleted" in bench.to_client.out
        removing.clear()
        assert _asked(bench, _PLAIN)[0] is not None

    asyncio.run(check())


def test_an_alias_is_resolved_each_time() -> None:
    async def check() -> None:
        bench = Bench(rules=ModelRules(8192, substitutes=substitutes({"chat": "tiny"}, {})))
        for request in (_PLAIN, _PLAIN.replace(b'"tiny"', b'"chat"')) * 2:
            ticket, got = _asked(bench, request)
            assert ticket is not None
            assert b'"model": "tiny"' in got or b'"model":"tiny"' in got

    asyncio.run(check())


def test_a_fallback_is_taken_each_time() -> None:
    async def check() -> None:
        bench = Bench(rules=ModelRules(8192, substitutes=substitutes({}, {"tiny": (["other"], ["queue_full"])})))
        bench.catalog.models["other"] = replace(MODEL, name="other:latest", blob=BlobDigest("o"))
        bench.controller.urls = []
        for _ in range(3):
            bench.ask([_PLAIN])
            bench.controller.reject(bench.controller.tickets[-1].id, "queue_full")
            assert bench.controller.tickets[-1].model.name == "other:latest"
            bench.controller.grant(bench.controller.tickets[-1].id, URL)
            bench.answer([_ANSWER])
        assert bench.request_log.statuses == [200, 200, 200]

    asyncio.run(check())


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("path", [b"/api/chat", b"/api/generate", b"/v1/chat/completions", b"/api/embed"])
@pytest.mark.parametrize(
    "setting",
    [
        *({"keep_alive": value} for value in (-1, "5m", 30, 0, None, "0", 5)),
        *({"options": options, "keep_alive": "5m"} for options in (*_OPTIONS, {"num_ctx": 99_999}, None)),
        {"stream": True, "keep_alive": "1h"},
        {"stream": None, "tools": []},
    ],
    ids=str,
)
def test_a_request_that_is_repeated_is_forwarded_as_the_first(
    path: bytes, setting: dict[str, object], compact: bool
) -> None:
    async def check() -> None:
        bench = _bench()
        prompts = ("hi", "hello again", "y" * 80)
        for members in ({"model": "other", "messages": [{"content": p}], "prompt": p, "input": p} for p in prompts):
            request = _request(path, {**members, **setting}, compact=compact)
            assert _asked(bench, request) == _asked(_bench(), request)

    asyncio.run(check())
