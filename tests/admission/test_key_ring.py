"""A key is found by its digest, wherever a request may carry it, and nothing else is taken for one."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.key_ring import KEY_PREFIX, KeyRing, digest_of, new_key, presented
from router.domain.access_key import UNLIMITED, AccessKey, KeyLimits

SECRET = new_key()
KEY = AccessKey("laptop", digest_of(SECRET), "anna", 0.0)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def found(headers: Mapping[str, str], *keys: AccessKey, now: float = 0.0) -> AccessKey | None:
    return KeyRing(keys or (KEY,), now).find(headers.get)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"bearer  {SECRET} "},
        {"authorization": SECRET},
        {"authorization": basic("x", SECRET)},
        {"authorization": basic("", SECRET)},
        {"x-api-key": SECRET},
        {"authorization": "Bearer unused", "x-api-key": SECRET},
    ],
)
def test_a_key_is_read_from_each_place(headers: dict[str, str]) -> None:
    assert found(headers) == KEY


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {SECRET}x"},
        {"authorization": f"Bearer {SECRET[:-1]}"},
        {"authorization": f"Bearer {KEY.sha256}"},
        {"authorization": "Basic !!!"},
        {"authorization": basic(SECRET, "x")},
        {"authorization": basic(SECRET, "")},
        {"x-api-key": "x" * 100_000},
        {"cookie": SECRET},
    ],
)
def test_nothing_else_is_a_key(headers: dict[str, str]) -> None:
    assert found(headers) is None


def test_a_new_key_has_256_random_bits_and_says_what_it_is() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)


def test_an_expired_key_is_not_found_and_the_next_expiry_is_known() -> None:
    soon, later = replace(KEY, expires_at=10.0), replace(KEY, name="b", sha256="0" * 64, expires_at=20.0)
    header = {"x-api-key": SECRET}
    assert found(header, soon, later, now=9.0) == soon
    assert found(header, soon, later, now=10.0) is None
    assert [KeyRing((soon, later), now).next_expiry for now in (0.0, 10.0, 20.0)] == [10.0, 20.0, float("inf")]


def test_a_key_without_limits_is_told_by_identity() -> None:
    key = found({"x-api-key": SECRET}, replace(KEY, limits=KeyLimits()))
    assert key is not None
    assert key.limits is UNLIMITED


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_headers_are_read(authorization: str, x_api_key: str) -> None:
    headers = {"authorization": authorization, "x-api-key": x_api_key}
    assert all(isinstance(text, str) and text for text in presented(headers.get))
    assert found(headers) is None


@given(st.binary(max_size=60))
def test_any_basic_credentials_are_read(raw: bytes) -> None:
    assert found({"authorization": "Basic " + base64.b64encode(raw).decode()}) is None
