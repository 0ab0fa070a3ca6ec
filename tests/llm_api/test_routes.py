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
     "/v1/models//a", "/v1/models/a/", "/api/blobs/..",
     "/v1/models/../../debug/pprof", "/v1/models/.", "/v1/images/..", "/v1/models/a/../b"],
)  # fmt: skip
def test_any_other_path_is_not(path: str) -> None:
    assert TABLE.find(path) is None


@pytest.mark.parametrize(
    ("method", "target", "redirection"),
    [
        ("GET", "/api/tags/", (301, "/api/tags")),
        ("GET", "/api/tags/?a=b", (301, "/api/tags?a=b")),
        ("HEAD", "/api/tags/", (307, "/api/tags")),
        ("POST", "/api/tags/", None),
        ("GET", "/api/chat/", None),
        ("POST", "/api/chat/", (307, "/api/chat")),
        ("GET", "/api/tags%2F", (301, "/api/tags")),
        ("GET", "/api/tags//", (307, "/api/tags/")),
        ("DELETE", "//api/tags?x=1", (307, "/api/tags?x=1")),
        ("GET", "/api//chat", (307, "/api/chat")),
        ("POST", "/api/./tags", (307, "/api/tags")),
        ("GET", "/api/../api/tags", (307, "/api/tags")),
        ("GET", "//", (307, "/")),
        ("GET", "/./", (307, "/")),
        ("PUT", "/.", (307, "/")),
        ("GET", "/v1/models/", (301, "/v1/models")),
        ("HEAD", "/v1/models/", None),
        ("GET", "/v1/models/tiny/", (301, "/v1/models/tiny")),
        ("POST", "/v1/models/tiny/", None),
        ("GET", "/v1/models/./tiny", (307, "/v1/models/tiny")),
        ("GET", "/v1/models/..", (307, "/v1")),
        ("GET", "/unknown//", (307, "/unknown/")),
        ("GET", "/api/tags", None),
        ("GET", "/debug/", None),
        ("GET", "/api/%2e/tags", None),
        ("GET", "/api//%0d%0aX", (307, "/api/%0d%0aX")),
        ("GET", '//"<x>', (307, "/%22%3Cx%3E")),
        ("GET", "*", None),
    ],
)
def test_unclean_targets_are_redirected_as_a_server_does(
    method: str, target: str, redirection: tuple[int, str] | None
) -> None:
    """As observed on 0.34.0."""
    assert TABLE.redirection(method, target) == redirection


def test_a_wrong_method_for_a_name_with_slashes_is_an_unknown_path() -> None:
    for path, lists_methods in (("/v1/models/a", True), ("/v1/models/a/b", False)):
        route = TABLE.find(path)
        assert route is not None
        assert (route.path, route.lists_methods) == ("/v1/models/*", lists_methods)


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
