"""Who may call from a browser: against what a real 0.24.0 answered, and by the rules that it follows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.origin_check import OriginPolicy, Origins, host_allowed, is_loopback, machine_names
from router.config.schema import ServerSettings
from router.llm_api.routes import RouteTable
from tests.contract.recording import recordings

DEFAULTS = Origins(ServerSettings().cors_origins)
OPEN, LOOPBACK = False, True
RECORDED = [recording for recording in recordings()
            if recording.name.removeprefix("0.24.0/").startswith(("cors-", "host-", "options-"))]  # fmt: skip


def policy(origins: Origins = DEFAULTS, on_loopback: bool = LOOPBACK, *names: str) -> OriginPolicy:
    return OriginPolicy(origins, on_loopback, names)


@pytest.mark.parametrize("recording", RECORDED, ids=lambda recording: recording.name)
def test_each_recorded_request_is_judged_as_the_real_server_judged_it(recording: object) -> None:
    request, head = recording.request, recording.reply.head  # type: ignore[attr-defined]
    line, *fields = request.decode().split("\r\n\r\n")[0].split("\r\n")
    method, path, _ = line.split(" ")
    sent = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    route = RouteTable().find(path)
    assert route is not None
    verdict = policy().judge(method, sent.get("host"), sent.get("origin"), route.methods)
    ours = verdict.headers if verdict.response is None else verdict.response.headers
    uninteresting = {"Date", "Content-Length", *(() if verdict.response else ("Content-Type",))}
    assert sorted(ours) == sorted((name, value) for name, value in head.headers if name not in uninteresting)
    assert (verdict.response.status if verdict.response else 200) == head.status
    if verdict.response is not None:
        assert verdict.response.body == b"".join(recording.reply.chunks)  # type: ignore[attr-defined]


def test_the_recordings_are_there() -> None:
    assert len(RECORDED) >= 9


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost", True),
        ("http://localhost:3000", True),
        ("https://127.0.0.1:8443", True),
        ("http://0.0.0.0:1", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://abc", True),
        ("http://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
        ("http://evil.example/http://localhost:", False),
        ("xhttp://localhost:1", False),
    ],
)
def test_programs_of_this_machine_may_call_and_other_pages_may_not(origin: str, allowed: bool) -> None:
    assert DEFAULTS.allow(origin) is allowed
    verdict = policy().judge("POST", "localhost:11434", origin, ("POST",))
    assert (verdict.response is None) is allowed
    if allowed:
        assert verdict.headers == (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))
    else:
        assert verdict.response is not None
        assert (verdict.response.status, verdict.response.body) == (403, b"")


def test_origins_may_be_added_and_a_star_allows_all() -> None:
    some = Origins(["https://chat.example", "http://*.lan"])
    assert some.allow("https://chat.example")
    assert some.allow("http://box.lan")
    assert not some.allow("https://chat.example:8443")
    every = Origins(["*"])
    assert every.allow_all
    assert policy(every).judge("POST", "localhost", "http://any.example", ("POST",)).headers == (
        ("Access-Control-Allow-Origin", "*"),
    )


def test_a_pattern_with_two_stars_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"server\.cors_origins: only one \* is allowed in 'http://\*\.\*'"):
        Origins(["http://*.*"])


def test_a_page_of_this_very_endpoint_is_no_stranger() -> None:
    for scheme in ("http", "https"):
        verdict = policy(Origins([])).judge("POST", "localhost:11434", f"{scheme}://localhost:11434", ("POST",))
        assert verdict.response is None
        assert verdict.headers == ()
    assert policy(Origins([])).judge("POST", "localhost:11434", "http://localhost", ("POST",)).response is not None


def test_what_sends_no_origin_is_let_through() -> None:
    verdict = policy(Origins([])).judge("POST", "localhost", None, ("POST",))
    assert (verdict.response, verdict.headers) == (None, ())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("", True),
        ("localhost", True),
        ("LOCALHOST:11434", True),
        ("127.0.0.1:11434", True),
        ("127.8.8.8", True),
        ("[::1]:11434", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("10.1.2.3", True),
        ("192.168.0.7:80", True),
        ("172.16.0.1", True),
        ("172.32.0.1", False),
        ("[fd00::1]:1", True),
        ("box.local", True),
        ("a.b.internal", True),
        ("x.localhost", True),
        ("mine", True),
        ("MINE:80", True),
        ("203.0.113.7", True),
        ("somehost", False),
        ("evil.example", False),
        ("8.8.8.8", False),
        ("local", False),
        ("notlocalhost", False),
        ("evil.example:11434:1", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("[::1]evil.example", False),
        ("[127.0.0.1", False),
    ],
)
def test_on_loopback_only_this_machines_names_are_answered(host: str, allowed: bool) -> None:
    """Else a page could reach the endpoint by a name of its own that it points at 127.0.0.1."""
    assert host_allowed(host, LOOPBACK, {"mine", "203.0.113.7"}) is allowed
    assert host_allowed(host, OPEN, set()) is True
    verdict = policy(DEFAULTS, LOOPBACK, "mine", "203.0.113.7").judge("POST", host, None, ("POST",))
    assert (verdict.response is None) is allowed


def test_the_origin_is_judged_before_the_host() -> None:
    verdict = policy().judge("POST", "evil.example", "http://localhost:1", ("POST",))
    assert verdict.response is not None
    assert verdict.response.status == 403
    assert ("Access-Control-Allow-Origin", "http://localhost:1") in verdict.response.headers


def test_options_without_an_origin_is_405_or_404() -> None:
    known, unknown = (policy().judge("OPTIONS", "127.0.0.1", None, allow).response for allow in (("POST",), ()))
    assert known is not None
    assert unknown is not None
    assert (known.status, unknown.status) == (405, 404)
    assert ("Allow", "POST") in known.headers


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.1", False), ("example.org", False)],
)  # fmt: skip
def test_an_address_to_listen_on_is_loopback_or_open(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_this_machine_knows_its_own_names() -> None:
    names = machine_names()
    assert "127.0.0.1" in names
    assert all(name == name.lower() for name in names)


@given(st.text(max_size=20), st.none() | st.text(max_size=20), st.sampled_from(("GET", "POST", "OPTIONS", "HEAD")))
def test_any_host_and_origin_is_judged(host: str, origin: str | None, method: str) -> None:
    verdict = policy().judge(method, host, origin, ("POST",))
    assert verdict.response is None or verdict.response.status in (204, 403, 404, 405)
    assert isinstance(host_allowed(host, LOOPBACK, ()), bool)
