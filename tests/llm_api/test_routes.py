"""Which paths are answered and how: everything else, `/debug` above all, does not pass."""

from __future__ import annotations

import pytest

from router.llm_api.body_schema import SCHEMAS
from router.llm_api.routes import KIND_WORDS, ROUTES, Kind, RouteTable

TABLE = RouteTable()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", Kind.MERGED),
        ("/api/chat", Kind.LEASED),
        ("/api/generate", Kind.LEASED),
        ("/api/embed", Kind.LEASED),
        ("/v1/chat/completions", Kind.LEASED),
        ("/v1/messages", Kind.LEASED),
        ("/v1/responses", Kind.LEASED),
        ("/v1/audio/transcriptions", Kind.LEASED),
        ("/v1/images/generations", Kind.LEASED),
        ("/api/tags", Kind.MERGED),
        ("/v1/models", Kind.MERGED),
        ("/v1/models/tiny", Kind.SHOW),
        ("/v1/models/me/tiny:latest", Kind.SHOW),
        ("/api/show", Kind.SHOW),
        ("/api/pull", Kind.MANAGED),
        ("/api/blobs/sha256:abc", Kind.MANAGED),
        ("/api/me", Kind.REFUSED),
        ("/api/user/keys/k", Kind.REFUSED),
        ("/metrics", Kind.ADMIN),
        ("/llamayard/status", Kind.ADMIN),
    ],
)
def test_a_known_path_is_answered_in_its_way(path: str, kind: Kind) -> None:
    route = TABLE.find(path)
    assert route is not None
    assert route.kind is kind


@pytest.mark.parametrize(
    "path",
    ["/debug/pprof", "/debug/pprof/", "/debug/vars", "/api", "/api/", "/api/chat/", "/API/chat", "/api/chat/x", "/v1",
     "/v1/messages/count_tokens", "/api/blobs", "/api/blobs/", "/api/blobs/a/b", "/v1/models/", "", "//", "/*",
     "/api/blobs/..", "/v1/models/../../debug/pprof", "/v1/models/.", "/v1/images/..", "/v1/models/a/../b"],
)  # fmt: skip
def test_any_other_path_is_not(path: str) -> None:
    assert TABLE.find(path) is None


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("/api/tags/", "/api/tags"),
        ("//api/tags", "/api/tags"),
        ("/api//chat", "/api/chat"),
        ("//", "/"),
        ("/api/tags", None),
        ("/debug/", None),
        ("/unknown//", None),
    ],
)
def test_a_path_with_a_slash_too_many_is_sent_to_the_clean_one(path: str, cleaned: str | None) -> None:
    assert TABLE.clean(path) == cleaned


def test_a_route_stands_once_and_is_said_in_words() -> None:
    paths = [route.path for route in ROUTES]
    assert len(paths) == len(set(paths))
    assert all(route.methods for route in ROUTES)
    assert set(KIND_WORDS) == set(Kind)


def test_every_path_with_a_reading_of_its_body_is_a_route_that_takes_bodies() -> None:
    for path in SCHEMAS:
        route = TABLE.find(path)
        assert route is not None, path
        assert set(route.methods) <= {"POST", "DELETE"}, path
