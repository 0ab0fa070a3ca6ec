"""The whole program with access keys: who gets in, what each key sees, and what the log and the metrics say."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}


def _llamayard(product: Product, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "router", *arguments, "--config", str(product.config)]
    return subprocess.run(
        command, env={**product.environment, **environment}, capture_output=True, text=True, check=False
    )


def _create(product: Product, name: str, *flags: str) -> str:
    made = _llamayard(product, "keys", "create", name, *flags)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


class _Keyed:
    def __init__(self, product: Product, keys: Mapping[str, str]) -> None:
        self.product, self.keys = product, keys

    async def ask(self, key: str | None, method: str, path: str, body: Any = None) -> Reply:
        headers = () if key is None else (("Authorization", f"Bearer {self.keys.get(key, key)}"),)
        return await call(self.product.address, method, path, body, headers)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Generator[_Keyed]:
    folder = tmp_path_factory.mktemp("keys")
    socket = f"unix:{folder}/admin.sock"
    config = {
        "log": {"format": "json"}, "poll": {"catalog_seconds": 0.2}, "server": {"host": "0.0.0.0"},
        "admin": {"listen": socket}, "management": {"pull": ["registry.ollama.ai/*"], "disk_free_min_bytes": 0},
    }  # fmt: skip
    product = prepare(folder, config, _FAST, ("--rig", "2x3090"))
    keys = {
        "all": _create(product, "all", "--class", "inference", "--class", "management", "--class", "admin"),
        "some": _create(product, "some", "--model", "small-a"),
        "limited": _create(product, "limited", "--requests-per-minute", "1"),
        "maker": _create(product, "maker", "--class", "management", "--model", "small-*"),
    }
    with running(product):
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in product.servers().values()}
        for name in ("small-a", "small-b"):
            put_into_store(Path(store), name, LLAMA_8B)
        yield _Keyed(product, keys)


def _chat(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 3}}


async def test_without_a_key_only_health_is_answered(keyed: _Keyed) -> None:
    named = {"model": "small-a"}
    requests = (("POST", "/api/chat", _chat("small-a")), ("GET", "/api/tags", None), ("DELETE", "/api/delete", named))
    for request in (*requests, ("GET", "/v1/models", None)):
        assert (await keyed.ask(None, *request)).status == 401
    assert (await keyed.ask(None, "GET", "/health")).status == 200
    assert (await keyed.ask(None, "GET", "/ready")).body == b"ready\n"


async def test_a_key_sees_its_models_only(keyed: _Keyed) -> None:
    async def both_are_listed() -> bool:
        rows = (await keyed.ask("all", "GET", "/api/tags")).json()["models"]
        return {"small-a:latest", "small-b:latest"} <= {row["name"] for row in rows}

    await eventually(both_are_listed, what="both models")
    for model in ("small-a", "small-b"):
        assert (await keyed.ask("all", "POST", "/api/chat", _chat(model))).status == 200
    tags = (await keyed.ask("some", "GET", "/api/tags")).json()["models"]
    models = (await keyed.ask("some", "GET", "/v1/models")).json()["data"]
    loaded = (await keyed.ask("some", "GET", "/api/ps")).json()["models"]
    assert [row["name"] for row in tags] == ["small-a:latest"] == [row["name"] for row in loaded]
    assert [row["id"] for row in models] == ["small-a:latest"]
    statuses = [(await keyed.ask("some", *request)).status for request in (
        ("POST", "/api/show", {"model": "small-a"}), ("POST", "/api/show", {"model": "small-b"}),
        ("GET", "/v1/models/small-b", None), ("POST", "/api/chat", _chat("small-a")),
        ("POST", "/api/chat", _chat("small-b")), ("POST", "/api/copy", {"source": "small-a", "destination": "x"}),
    )]  # fmt: skip
    assert statuses == [200, 403, 403, 200, 403, 403]


async def test_a_key_cannot_take_a_model_by_the_digest_of_its_weights(keyed: _Keyed) -> None:
    body = {"model": "small-c", "files": {"m.gguf": f"sha256:{'0' * 64}"}, "stream": False}
    reply = await keyed.ask("maker", "POST", "/api/create", body)
    assert (reply.status, "files, adapters" in reply.json()["error"]) == (403, True)


async def test_a_key_limited_to_models_cannot_tell_which_blobs_there_are(keyed: _Keyed) -> None:
    weights = b"weights of somebody else"
    digests = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in (weights, b"nobody has these")]
    assert (await keyed.ask("all", "POST", f"/api/blobs/{digests[0]}", weights)).status == 201
    assert [(await keyed.ask("all", "HEAD", f"/api/blobs/{each}")).status for each in digests] == [200, 404]
    for method in ("HEAD", "POST"):
        replies = [await keyed.ask("maker", method, f"/api/blobs/{each}") for each in digests]
        assert [(reply.status, reply.body) for reply in replies] == [(403, replies[0].body)] * 2
    assert b"limited to models" in replies[0].body
    assert (await keyed.ask("some", "HEAD", f"/api/blobs/{digests[0]}")).status == 403


async def test_a_base_that_a_key_may_not_use_is_refused_whether_it_exists_or_not(keyed: _Keyed) -> None:
    refusals = set[tuple[int, str]]()
    for base in ("llama3.1:8b", "elsewhere.example/none/none:1"):
        body = {"model": "small-c", "from": base, "stream": False}
        reply = await keyed.ask("maker", "POST", "/api/create", body)
        refusals.add((reply.status, reply.json()["error"].replace(base, "BASE")))
    assert [status for status, _ in refusals] == [403]


async def test_limits_hold_over_both_ways_in(keyed: _Keyed) -> None:
    assert (await keyed.ask("limited", "GET", "/api/version")).status == 200
    refused = [await keyed.ask("limited", "POST", "/v1/chat/completions", _chat("small-a"))]
    refused.append(await keyed.ask("limited", "GET", "/v1/models"))
    for reply in refused:
        assert (reply.status, reply.header("x-ratelimit-limit-requests")) == (429, "1")
        assert 1 <= int(reply.header("Retry-After") or 0) <= 60


async def test_admin_has_a_socket_of_its_own_and_the_log_no_key(keyed: _Keyed) -> None:
    for path in ("/metrics", "/llamayard/status"):
        assert (await keyed.ask("all", "GET", path)).status == 404
    shown = _llamayard(keyed.product, "status", "--json")
    assert shown.returncode == 0, shown.stderr
    assert {row["name"] for row in json.loads(shown.stdout)["instances"]} >= {"gpu0", "gpu1"}
    socket = keyed.product.config.parent / "admin.sock"
    assert socket.stat().st_mode & 0o777 == 0o660
    log = keyed.product.log_text()
    assert not [name for name, secret in keyed.keys.items() if secret in log]
    assert '"key": "some"' in log or '"key":"some"' in log


async def test_changes_of_the_keys_apply_without_a_restart(keyed: _Keyed) -> None:
    secret = _create(keyed.product, "late")

    async def status_is(wanted: int) -> bool:
        return (await keyed.ask(secret, "POST", "/api/chat", _chat("small-a"))).status == wanted

    await eventually(lambda: status_is(200), what="the new key")
    assert _llamayard(keyed.product, "keys", "revoke", "late").returncode == 0
    await eventually(lambda: status_is(401), what="the end of the revoked key")


def test_a_broken_file_of_keys_changes_nothing_and_is_shown(tmp_path: Path) -> None:
    product = prepare(tmp_path, {}, _FAST, ("--rig", "h100"))
    secret = _create(product, "first", "--class", "inference", "--class", "admin")
    (file,) = (tmp_path / "state").rglob("keys.json")
    headers = (("Authorization", f"Bearer {secret}"),)

    async def problems() -> list[str]:
        return (await call(product.address, "GET", "/llamayard/status", None, headers)).json()["problems"]

    async def breaks(content: bytes) -> None:
        file.write_bytes(content)

        async def is_shown() -> bool:
            return "the keys stay as they were" in "".join(await problems())

        await eventually(is_shown, what="the problem")
        assert (await call(product.address, "GET", "/api/tags", None, headers)).status == 200
        assert (await call(product.address, "GET", "/api/tags")).status == 401

    async def play() -> None:
        kept = file.read_bytes()
        for content in (b"null", b"", b'{"keys": [{"name": "\xff"}]}'):
            await breaks(content)
        assert "PROBLEMS" in _llamayard(product, "status", LLAMAYARD_API_KEY=secret).stdout
        file.write_bytes(kept)

        async def is_gone() -> bool:
            return not await problems()

        await eventually(is_gone, what="the end of the problem")

    with running(product):
        asyncio.run(play())
    file.write_bytes(b"null")
    product.start(ready=False)
    assert product.wait() == 2
    assert f"server.keys_file: {file}: not a file of `llamayard keys`" in product.log_text()


def test_an_open_port_without_keys_is_refused_at_start(tmp_path: Path) -> None:
    product = prepare(tmp_path, {"server": {"host": "0.0.0.0"}}, _FAST, ("--rig", "h100"))
    product.start(ready=False)
    assert product.wait() == 2
    assert "server.host: 0.0.0.0 can be reached from other machines" in product.log_text()
    _create(product, "first")
    with running(product):
        assert product.call("GET", "/api/tags")[0] == 401
        assert product.call("GET", "/llamayard/status")[0] == 401
        assert "LLAMAYARD_API_KEY" in _llamayard(product, "status").stderr
        admin = _create(product, "watcher", "--class", "admin")

        def shown() -> bool:
            return _llamayard(product, "status", LLAMAYARD_API_KEY=admin).returncode == 0

        eventually_sync(shown, what="the status")


def test_an_open_port_may_be_anonymous(tmp_path: Path) -> None:
    config = {"server": {"host": "0.0.0.0", "allow_anonymous": True}}
    with running(prepare(tmp_path, config, _FAST, ("--rig", "h100"))) as product:
        assert product.call("GET", "/api/tags")[0] == 200
        product.signal(signal.SIGTERM)
        assert product.wait() == 0
        assert not (tmp_path / "state" / "keys.json").exists()
