"""Parses `keep_alive` like Ollama 0.11.4: the values and error texts were recorded from that server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.keep_alive import parse_go_duration, parse_keep_alive


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0.0),
        (300, 300.0),
        (1.5, 1.5),
        (-1, -1.0),
        (-0.5, -1.0),
        ("0", 0.0),
        ("5m", 300.0),
        ("+5m", 300.0),
        ("1h30m", 5400.0),
        ("300ms", 0.3),
        ("5µs", 5e-6),
        ("5μs", 5e-6),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("1.5h", 5400.0),
        ("-5m", -1.0),
        ("24h", 86400.0),
    ],
)
def test_valid_values_of_a_request(value: object, seconds: float | None) -> None:
    assert parse_keep_alive(value, plain_seconds=False) == seconds
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("soon", 'time: invalid duration "soon"'),
        ("", 'time: invalid duration ""'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("300", 'time: missing unit in duration "300"'),
        ("00", 'time: missing unit in duration "00"'),
        ("0.0", 'time: missing unit in duration "0.0"'),
        ("5m3", 'time: missing unit in duration "5m3"'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        ("1e3", 'time: unknown unit "e" in duration "1e3"'),
        (".s", 'time: invalid duration ".s"'),
        ("--1s", 'time: invalid duration "--1s"'),
        (" 5m", 'time: invalid duration " 5m"'),
        ('"q', 'time: invalid duration "\\"q"'),
        ("é", 'time: invalid duration "\\xc3\\xa9"'),
        ("9999999999999h", 'time: invalid duration "9999999999999h"'),
        (True, "Unsupported type: 'bool'"),
        ([1], "Unsupported type: '[]interface {}'"),
        ({"a": 1}, "Unsupported type: 'map[string]interface {}'"),
    ],
)
def test_invalid_values_of_a_request_are_refused_with_the_servers_error(value: object, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_keep_alive(value, plain_seconds=False)
    assert str(refusal.value) == words


@pytest.mark.parametrize(("text", "seconds"), [("300", 300.0), ("-1", -1.0), ("00", 0.0), ("+7", 7.0)])
def test_settings_may_write_plain_seconds_as_text(text: str, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="Unsupported type"):
        parse_keep_alive(float("nan"))


@given(st.integers(0, 2**62 // 10**9), st.integers(0, 59), st.integers(0, 999))
def test_a_sum_of_units_is_the_sum_of_its_parts(seconds: int, minutes: int, millis: int) -> None:
    total = parse_go_duration(f"{minutes}m{seconds}s{millis}ms")
    assert total == pytest.approx(minutes * 60 + seconds + millis / 1000)


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        seconds = parse_keep_alive(text)
    except ValueError as error:
        assert str(error).startswith("time: ")
    else:
        assert seconds is not None and (seconds >= 0 or seconds == -1.0)
