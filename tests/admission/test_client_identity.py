"""Client identity: keys are never kept in clear, placeholders do not count, and layouts are parsed or refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from router.admission.client_identity import client_of, layout_of, priority_of, session_of
from router.domain.client_identity import ClientIdentity
from router.domain.gpu import Gpu, GpuUuid
from router.domain.request import Layout, LayoutKind
from router.errors import BadRequest, LayoutUnavailable

_ADDRESS = "192.0.2.7"
_GPUS = {
    GpuUuid("GPU-aa"): Gpu(GpuUuid("GPU-aa"), 0, "first", 10, 10, 0),
    GpuUuid("GPU-bb"): Gpu(GpuUuid("GPU-bb"), 1, "second", 10, 10, 0),
}


def identity_with(**headers: str) -> ClientIdentity:
    named: Mapping[str, str] = {name.replace("_", "-"): value for name, value in headers.items()}
    return ClientIdentity(
        client_of(named.get, _ADDRESS),
        session_of(named.get),
        priority_of(named.get) or 0,
        layout_of(named.get, lambda: _GPUS),
    )


def test_one_key_is_one_client_and_never_shown() -> None:
    first, again = identity_with(authorization="Bearer sk-secret"), identity_with(authorization="Bearer sk-secret")
    assert first.client == again.client
    assert first.client.startswith("key:")
    assert "sk-secret" not in repr(first)
    assert identity_with(authorization="Bearer sk-other").client != first.client
    assert identity_with(x_api_key="sk-secret").client == first.client


@pytest.mark.parametrize("header", ["Bearer ollama", "Bearer unused", "Bearer", "", "Bearer X"])
def test_a_made_up_key_leaves_the_address(header: str) -> None:
    assert identity_with(authorization=header).client == _ADDRESS


def test_users_behind_one_key_are_told_apart() -> None:
    users = [identity_with(authorization="Bearer k1", x_openwebui_user_id=user).client for user in ("anna", "ben")]
    assert [client.rpartition("/")[2] for client in users] == ["user:anna", "user:ben"]
    assert identity_with(x_openwebui_user_id="anna").client == "user:anna"


def test_a_session_is_named_by_its_own_header_before_open_webuis() -> None:
    assert identity_with(x_session_id="s", x_openwebui_chat_id="c").session == "s"
    assert identity_with(x_openwebui_chat_id="c").session == "c"
    assert identity_with().session == ""


def test_what_goes_to_logs_is_plain_and_short() -> None:
    client_identity = identity_with(x_openwebui_user_id="a\tb\x1b[31m é" + "c" * 200)
    assert client_identity.client == "user:ab31m" + "c" * 59


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("single", Layout(LayoutKind.SINGLE)),
        (" Spread ", Layout(LayoutKind.SPREAD)),
        ("gpu:1", Layout(LayoutKind.GPU, GpuUuid("GPU-bb"))),
        ("gpu:gpu-AA", Layout(LayoutKind.GPU, GpuUuid("GPU-aa"))),
    ],
)
def test_a_layout_is_read(text: str, layout: Layout) -> None:
    assert identity_with(x_llamayard_layout=text).layout == layout


@pytest.mark.parametrize("text", ["both", "gpu", "gpu:", "single:1", "gpus:0"])
def test_what_is_no_layout_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(BadRequest, match="single, spread, or gpu:"):
        identity_with(x_llamayard_layout=text)


def test_a_gpu_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(LayoutUnavailable, match=r"0 \(GPU-aa\), 1 \(GPU-bb\)") as caught:
        identity_with(x_llamayard_layout="gpu:2")
    assert (caught.value.status, caught.value.code) == (409, "layout_unavailable")


def test_the_gpus_are_looked_at_only_where_a_layout_is_asked_for() -> None:
    def never() -> dict[GpuUuid, Gpu]:
        raise AssertionError("the GPUs were looked at")

    assert layout_of(dict[str, str]().get, never) is None


def test_a_priority_has_three_words() -> None:
    assert [identity_with(x_llamayard_priority=word).priority for word in ("low", "Normal", "high")] == [-1, 0, 1]
    with pytest.raises(BadRequest, match="low, normal or high"):
        identity_with(x_llamayard_priority="9")
