"""The endpoint is read without the whole check only where both ways agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from router.config.endpoint import Endpoint, plain_endpoint
from router.config.settings import ConfigError, load_settings

HOME = {"HOME": "/home/x"}


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "llamayard.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "server: {host: file, port: 1, tls_certificate: ~/c.pem}\nqueue: {limit: 3}\n")
    assert plain_endpoint(path, HOME, {}) == Endpoint("file", 1, Path("/home/x/c.pem"))
    environment = {**HOME, "LLAMAYARD_SERVER__PORT": "2", "LLAMAYARD_QUEUE__LIMIT": "4"}
    assert plain_endpoint(path, environment, {}) == Endpoint("file", 2, Path("/home/x/c.pem"))
    flags = {"server.port": "3", "server.host": "flag"}
    assert plain_endpoint(path, environment, flags) == Endpoint("flag", 3, Path("/home/x/c.pem"))
    assert plain_endpoint(None, HOME, {}) == Endpoint("127.0.0.1", 11434, None)


@pytest.mark.parametrize(
    ("text", "environment", "flags"),
    [
        ("server: {port: x}", {}, {}),
        ("server: {port: 65536}", {}, {}),
        ("server: {port: true}", {}, {}),
        ("server: {host: 1}", {}, {}),
        ("server: {host: ''}", {}, {}),
        ("server: [1]", {}, {}),
        ("server: {port: 1", {}, {}),
        ("", {"LLAMAYARD_SERVER": "{port: 1}"}, {}),
        ("", {"LLAMAYARD_SERVER__PORT": "null"}, {}),
        ("", {"LLAMAYARD_SERVER__PORT": "1", "LLAMAYARD_server__port": "2"}, {}),
        ("", {}, {"rig": "2x3090"}),
        ("", {}, {"server.port": "1e3"}),
    ],
)
def test_whatever_is_not_plain_is_left_to_the_whole_check(
    tmp_path: Path, text: str, environment: Mapping[str, str], flags: Mapping[str, object]
) -> None:
    assert plain_endpoint(_file(tmp_path, text), {**HOME, **environment}, flags) is None


_PORTS = st.sampled_from([1, 65535, 65536, -1, True, 1.0, "8", " 8", "8_0", "0x8", "", "null", None, "[8]", "٣"])
_HOSTS = st.sampled_from(["h", "", "::", 5, None, "null", "{}", "[::1]", " h ", ["h"]])
_PATHS = st.sampled_from(["~/c", "~", "c", "", None, 5, "null", "/c"])


@st.composite
def _sections(draw: st.DrawFn) -> dict[str, Any]:
    keys = {"host": _HOSTS, "port": _PORTS, "tls_certificate": _PATHS}
    section = {key: draw(values) for key, values in keys.items() if draw(st.booleans())}
    return section if section.get("tls_certificate") is None else {**section, "tls_key": "~/k"}


@given(in_file=_sections(), in_environment=_sections(), in_flags=_sections())
def test_both_ways_read_the_same_endpoint(
    tmp_path_factory: pytest.TempPathFactory,
    in_file: dict[str, Any],
    in_environment: dict[str, Any],
    in_flags: dict[str, Any],
) -> None:
    path = _file(tmp_path_factory.mktemp("c"), yaml.safe_dump({"server": in_file}))
    texts = {key: value for key, value in in_environment.items() if isinstance(value, str)}
    environment = {**HOME, **{f"LLAMAYARD_SERVER__{key.upper()}": value for key, value in texts.items()}}
    flags = {f"server.{key}": value for key, value in in_flags.items() if isinstance(value, str) and key != "tls_key"}
    plain = plain_endpoint(path, environment, flags)
    if plain is None:
        return
    try:
        server = load_settings(path, environment, flags).server
    except ConfigError as error:
        assert all("tls_" in problem for problem in error.problems)  # a certificate without its key
        return
    assert plain == Endpoint(server.host, server.port, server.tls_certificate)
