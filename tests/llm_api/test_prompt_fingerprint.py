"""Fingerprints of what a body says, for each API: what they cover, and what they must not mind."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.llm_api.prompt_fingerprint import fingerprints, fingerprints_of
from router.scheduler.balancing.prefix_affinity import LENGTHS
from tests.support.tree import ROOT

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


BODIES: dict[str, Any] = {
    "/api/chat": lambda *texts: {"model": "m", "messages": _talk(*texts), "stream": True, "keep_alive": 5},
    "/api/generate": lambda *texts: {"model": "m", "system": "Be kind.", "prompt": " ".join(texts), "raw": True},
    "/api/embed": lambda *texts: {"model": "m", "input": list(texts)},
    "/v1/chat/completions": lambda *texts: {"model": "m", "tools": [{"a": 1}], "messages": _talk(*texts), "n": 1},
    "/v1/completions": lambda *texts: {"model": "m", "prompt": " ".join(texts), "max_tokens": 5},
    "/v1/responses": lambda *texts: {"model": "m", "instructions": "Be kind.", "input": _talk(*texts)},
    "/v1/messages": lambda *texts: {"model": "m", "max_tokens": 9, "system": "Be kind.", "messages": _talk(*texts)},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["dense", "wide"])
def test_a_turn_begins_as_the_turn_before_it(path: str, separators: tuple[str, str]) -> None:
    first, second, other = (
        fingerprints_of(path, json.dumps(BODIES[path](*texts), separators=separators).encode())
        for texts in ((TEXT,), (TEXT, "And then?", TEXT), ("x" + TEXT,))
    )
    covered = sum(length <= len(TEXT) for length in LENGTHS)
    assert first[:covered] == second[:covered]
    assert len(second) > covered
    assert not set(first) & set(other)


def test_what_stands_before_the_text_does_not_matter() -> None:
    one = {"model": "m", "messages": _talk(TEXT)}
    other = {"stream": False, "options": {"num_ctx": 4096, "seed": 7}, "model": "an-alias:latest", **one}
    other["model"] = "an-alias:latest"
    prints = [fingerprints_of("/api/chat", json.dumps(body).encode()) for body in (one, other)]
    assert prints[0] == prints[1] != ()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", b""),
        ("/api/chat", b"{}"),
        ("/api/chat", b'{"messages": [{"role": "user", "content": "hi"}]}'),
        ("/api/chat", json.dumps({"prompt": TEXT}).encode()),
        ("/api/tags", json.dumps({"messages": TEXT}).encode()),
        ("/api/chat", b'{"model": "' + b"m" * 5000 + b'", "messages": ' + json.dumps(TEXT).encode() + b"}"),
    ],
)
def test_a_body_without_a_text_or_with_little_has_none(path: str, body: bytes) -> None:
    assert fingerprints_of(path, body) == ()


@given(st.sampled_from(sorted(BODIES)), st.binary(max_size=600))
def test_no_body_is_too_odd(path: str, body: bytes) -> None:
    for text in (body, b'{"prompt":' + body, b'{"messages" : ' + body):
        assert len(fingerprints_of(path, text)) <= sum(length <= len(text) for length in LENGTHS)


TEXTS = st.binary(max_size=3000)


@given(TEXTS, TEXTS, TEXTS)
def test_prompts_have_as_many_fingerprints_in_common_as_they_have_beginnings(
    shared: bytes, one: bytes, other: bytes
) -> None:
    first, second = shared + b"1" + one, shared + b"2" + other
    pairs = list(zip(fingerprints(first), fingerprints(second), strict=False))
    alike = sum(length <= len(shared) for length in LENGTHS)
    assert all(mine == theirs for mine, theirs in pairs[:alike])
    assert all(mine != theirs for mine, theirs in pairs[alike:])
    assert len(fingerprints(first)) == sum(length <= len(first) for length in LENGTHS)
    assert fingerprints(memoryview(first)) == fingerprints(first)


def test_fingerprints_are_the_same_in_every_process() -> None:
    code = "from router.llm_api.prompt_fingerprint import fingerprints; print(fingerprints(b'a prompt ' * 100))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == str(fingerprints(b"a prompt " * 100))
