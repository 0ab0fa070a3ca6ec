"""What an access key allows: models by pattern, priorities, keep_alive within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.access_key import AccessKey, matches


def key(**rules: object) -> AccessKey:
    return AccessKey("k", "0", "u", 0.0, **rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "name", "allowed"),
    [
        ("*", "anything:1b", True),
        ("*", "no valid name !", True),
        ("qwen3*", "qwen3:8b", True),
        ("qwen3*", "Qwen3", True),
        ("qwen3*", "qwen2:8b", False),
        ("qwen3*", "evil/qwen3:8b", False),
        ("qwen3:?b", "qwen3:8b", True),
        ("qwen3:?b", "qwen3:14b", False),
        ("llama3.1", "llama3.1", True),
        ("llama3.1", "llama3.1:latest", True),
        ("llama3.1", "llama3.1:8b", False),
        ("llama3.1", "llama3x1", False),
        ("hf.co/*", "hf.co/bartowski/Llama:Q4", True),
        ("registry.ollama.ai/library/*", "tiny", True),
        ("registry.ollama.ai/library/*", "hf.co/library/tiny", False),
        ("tiny", "no valid name !", False),
    ],
)
def test_a_pattern_is_compared_with_the_short_and_the_whole_name(pattern: str, name: str, allowed: bool) -> None:
    assert matches((pattern,), name) is allowed
    assert key(models=(pattern,)).allows_model(name) is allowed


@given(st.sampled_from("abc:./-"), st.text("ab", min_size=1, max_size=6))
def test_a_pattern_without_wildcards_matches_one_name_only(other: str, name: str) -> None:
    assert matches((f"{name}:1b",), f"{name}:1b")
    assert not matches((f"{name}:1b",), f"{name}{other}x:1b")


_SECONDS = st.none() | st.just(-1.0) | st.floats(0, 1e6)


def _order(seconds: float) -> float:
    return float("inf") if seconds < 0 else seconds


@given(_SECONDS, _SECONDS, _SECONDS)
def test_a_keep_alive_stays_within_the_bounds(asked: float | None, least: float | None, most: float | None) -> None:
    got = key(keep_alive_seconds_min=least, keep_alive_seconds_max=most).bounded_keep_alive(asked)
    if asked is None:
        assert got is None
        return
    assert got is not None
    if least is not None:
        assert _order(got) >= _order(least)
    if most is not None and (least is None or _order(least) <= _order(most)):
        assert _order(got) <= _order(most)
    if (least is None or _order(least) <= _order(asked)) and (most is None or _order(asked) <= _order(most)):
        assert got == asked


def test_a_request_may_lower_its_priority_and_not_raise_it() -> None:
    assert [key().bounded_priority(asked) for asked in (None, -1, 0, 1)] == [0, -1, 0, 0]
    assert [key(priority=1).bounded_priority(asked) for asked in (None, -1, 1)] == [1, -1, 1]
    assert [key(priority=-1).bounded_priority(asked) for asked in (None, 0, 1)] == [-1, -1, -1]


def test_a_key_is_valid_until_it_expires() -> None:
    assert key().is_valid(1e12)
    assert [key(expires_at=10.0).is_valid(now) for now in (9.9, 10.0)] == [True, False]
