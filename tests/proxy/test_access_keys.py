"""Access keys on the raw proxy: what is forwarded, refused in each API's shape, charged, and forgotten on a change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from router.admission.access import AccessRules
from router.admission.key_budgets import KeyBudgets
from router.admission.key_ring import KeyRing, KeyStore, digest_of, new_key
from router.admission.origin_check import OriginPolicy, Origins
from router.admission.pipeline import admission_pipeline
from router.domain.access_key import AccessKey, KeyLimits
from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import substitutes
from router.llm_api.routes import RouteTable
from router.observability.access_log import AccessLog
from router.observability.metrics import Metrics
from router.proxy.server import ProxyServer
from tests.proxy.stage import LIMITS, MODEL, VIA, Stage, replying, staged, then_waiting
from tests.support.rawhttp import Address, Reply, connect, request_bytes
from tests.support.waiting import eventually

SECRET = new_key()
KEY = AccessKey("laptop", digest_of(SECRET), "anna", 0.0)
BEARER = (("Authorization", f"Bearer {SECRET}"),)
_LINE = b'{"model":"tiny","done":true,"prompt_eval_count":30,"eval_count":20}'
COUNTED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_LINE), _LINE)


class Keyed:
    """A proxy that needs a key, over the stage's scripted parts."""

    def __init__(self, stage: Stage, store: KeyStore, proxy: ProxyServer, address: Address, metrics: Metrics) -> None:
        self.stage, self.store, self.proxy, self.address, self.metrics = stage, store, proxy, address, metrics
        self.lines: list[dict[str, object]] = []

    async def ask(
        self, path: str = "/api/chat", headers: tuple[tuple[str, str], ...] = BEARER, **body: object
    ) -> Reply:
        async with connect(self.address, 10.0) as connection:
            members = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **body}
            await connection.send(request_bytes("POST", path, members, headers))
            return await connection.reply()

    def remaining_tokens(self) -> str:
        charge = self.proxy.context.budgets.begin(_only(self.store), takes_slot=False)
        assert charge is not None
        return charge.headers()["x-ratelimit-remaining-tokens"]


def _only(store: KeyStore) -> AccessKey:
    assert store.ring is not None
    key = store.ring.find({name.lower(): value for name, value in BEARER}.get)
    assert key is not None
    return key


@asynccontextmanager
async def keyed(key: AccessKey = KEY, rules: ModelRules = ModelRules(8192)) -> AsyncGenerator[Keyed]:  # noqa: B008
    async with staged(rules=rules) as stage:
        store, controller, metrics = KeyStore(KeyRing((key,), 0.0)), stage.controller, Metrics()
        origins = OriginPolicy(Origins(()), True, frozenset())
        pipeline = admission_pipeline(origins, LIMITS, dict, RouteTable(), VIA, AccessRules(store))
        lines: list[dict[str, object]] = []
        log = AccessLog(metrics, controller.now, lambda _, values: lines.append(values))
        context = replace(
            stage.proxy.context, pipeline=pipeline, budgets=KeyBudgets(controller.now), request_log=log,
        )  # fmt: skip
        proxy = ProxyServer(context)
        listener = await asyncio.get_running_loop().create_server(proxy, "127.0.0.1", 0)
        found = Keyed(stage, store, proxy, Address("127.0.0.1", listener.sockets[0].getsockname()[1]), metrics)
        found.lines = lines
        try:
            yield found
        finally:
            listener.close()
            await proxy.close()


async def test_a_key_is_neither_forwarded_nor_logged() -> None:
    async with keyed() as proxy:
        for headers in (BEARER, (("X-Api-Key", SECRET),)):
            assert (await proxy.ask(headers=headers)).status == 200
        (first, second) = proxy.stage.upstream.turns
        for text in (first.head, second.head, repr(proxy.lines).encode()):
            assert SECRET.encode() not in text
            assert b"uthorization" not in text
        assert [(line["client"], line["key"]) for line in proxy.lines] == [("key:anna", "laptop")] * 2
        assert [ticket.client for ticket in proxy.stage.controller.tickets] == ["key:anna"] * 2


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/chat", {"error": ...}),
        ("/v1/chat/completions",
         {"error": {"message": ..., "type": "authentication_error", "param": None, "code": "unauthorized"}}),
        ("/v1/messages",
         {"type": "error", "error": {"type": "authentication_error", "message": ...}, "request_id": ...}),
    ],
)  # fmt: skip
async def test_without_a_key_the_error_has_the_apis_own_shape(path: str, error: dict[str, object]) -> None:
    async with keyed() as proxy:
        reply = await proxy.ask(path, headers=())
        assert (reply.status, reply.header("X-Llamayard-Error")) == (401, "unauthorized")
        assert reply.header("WWW-Authenticate") == 'Bearer realm="llamayard"'
        assert _like(error, reply.json()), reply.body
        assert not proxy.stage.upstream.turns


def _like(pattern: object, value: object) -> bool:
    if isinstance(pattern, dict) and isinstance(value, dict):
        return pattern.keys() == value.keys() and all(_like(pattern[name], value[name]) for name in pattern)
    return pattern is ... or pattern == value


async def test_a_key_for_some_models_may_not_use_others_or_learn_of_them() -> None:
    async with keyed(replace(KEY, models=("small*",))) as proxy:
        replies = [await proxy.ask(model=name) for name in ("tiny", "absent")]
        assert [reply.status for reply in replies] == [403, 403]
        assert replies[0].json()["error"] == "key 'laptop' may not use model 'tiny'"
        unreadable = await proxy.ask(model=None)
        assert unreadable.status == 403
        assert not proxy.stage.upstream.turns


async def test_an_alias_counts_as_its_model_and_a_fallback_must_be_allowed() -> None:
    names = substitutes({"gpt": "tiny"}, {"tiny": (("hidden", "small"), ("unknown_model",))})
    rules = ModelRules(8192, substitutes=names)
    async with keyed(replace(KEY, models=("tiny", "small")), rules) as proxy:
        proxy.stage.catalog.models.update(hidden=replace(MODEL, name="hidden:latest"))
        proxy.stage.catalog.models.update(small=replace(MODEL, name="small:latest"))
        assert (await proxy.ask(model="gpt")).status == 200
        del proxy.stage.catalog.models["tiny"]
        reply = await proxy.ask(model="tiny")
        assert (reply.status, reply.header("X-Llamayard-Model")) == (200, "small")
    async with keyed(replace(KEY, models=("gpt",)), rules) as proxy:
        assert (await proxy.ask(model="gpt")).status == 403


async def test_a_larger_context_and_an_unload_are_refused_and_a_keep_alive_is_bounded() -> None:
    bounded = replace(KEY, context_length_max=4096, keep_alive_seconds_min=60.0, keep_alive_seconds_max=600.0)
    async with keyed(bounded) as proxy:
        refused = await proxy.ask(options={"num_ctx": 8192})
        assert (refused.status, "at most 4096 tokens" in refused.json()["error"]) == (403, True)
        assert (await proxy.ask(options={"num_ctx": 4096})).status == 200
        unload = await proxy.ask("/api/generate", messages=None, keep_alive=0)
        assert (unload.status, "may not unload" in unload.json()["error"]) == (403, True)
        for asked in (-1, "1s", "5m"):
            assert (await proxy.ask(keep_alive=asked)).status == 200
        assert [ticket.keep_alive_seconds for ticket in proxy.stage.controller.tickets[1:]] == [600.0, 60.0, 300.0]


async def test_requests_beyond_the_limit_get_429_with_the_time_to_wait() -> None:
    async with keyed(replace(KEY, limits=KeyLimits(requests_per_minute=2))) as proxy:
        for _ in range(2):
            assert (await proxy.ask("/v1/chat/completions")).status == 200
        reply = await proxy.ask("/v1/chat/completions")
        assert (reply.status, reply.header("Retry-After")) == (429, "30")
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert (reply.header("x-ratelimit-limit-requests"), reply.header("x-ratelimit-remaining-requests")) == (
            "2",
            "0",
        )
        assert (await proxy.ask("/v1/messages")).json()["error"]["type"] == "rate_limit_error"
        assert "requests a minute" in (await proxy.ask("/api/chat")).json()["error"]
        assert len(proxy.stage.upstream.turns) == 2


async def test_tokens_are_charged_by_the_answer_and_shown_on_openais_api() -> None:
    async with keyed(replace(KEY, limits=KeyLimits(tokens_per_day=100_000))) as proxy:
        proxy.stage.upstream.script = replying(COUNTED)
        reply = await proxy.ask("/v1/chat/completions", max_tokens=100)
        assert reply.header("x-ratelimit-limit-tokens") == "100000"
        assert 99_880 < int(reply.header("x-ratelimit-remaining-tokens") or 0) <= 99_900  # reserved so far
        assert (await proxy.ask("/api/chat")).header("x-ratelimit-limit-tokens") is None
        await eventually(lambda: len(proxy.lines) == 2, what="both requests in the log")
        assert proxy.remaining_tokens() in ("99900", "99901")  # twice 30 and 20
        samples = {(sample.name, sample.labels.get("type")): sample.value for family in proxy.metrics.registry.collect()
                   for sample in family.samples if sample.labels.get("key") == "laptop"}  # fmt: skip
        assert samples["llamayard_key_tokens_total", "prompt"] == 60
        assert samples["llamayard_key_tokens_total", "generation"] == 40


async def test_a_refused_request_gives_its_tokens_back() -> None:
    async with keyed(replace(KEY, limits=KeyLimits(tokens_per_day=10_000, concurrent_requests=1))) as proxy:
        proxy.stage.upstream.script = replying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
        for _ in range(3):  # the one request in progress is given back as well
            assert (await proxy.ask(options={"num_predict": 1000})).status == 400
        await eventually(lambda: len(proxy.lines) == 3, what="the requests in the log")
        assert proxy.remaining_tokens() in ("9999", "10000")


async def test_a_client_that_leaves_frees_its_place_and_pays_for_what_it_got() -> None:
    chunk = b'5\r\n{"a"}\r\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with keyed(replace(KEY, limits=KeyLimits(tokens_per_day=10_000, concurrent_requests=1))) as proxy:
        proxy.stage.upstream.script = then_waiting(head, *[chunk] * 7)
        async with connect(proxy.address, 10.0) as leaving:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "y" * 4000}], "stream": True}
            await leaving.send(request_bytes("POST", "/api/chat", body, BEARER))
            await leaving.head()
            for _ in range(7):
                await leaving.chunk()
            second = await proxy.ask()
            assert (second.status, second.header("Retry-After")) == (429, "1")
            leaving.abort()
        await eventually(lambda: len(proxy.lines) == 2, what="the request in the log")
        used = 10_000 - int(proxy.remaining_tokens())
        assert used >= 1000 + 7  # its prompt by estimate, and seven tokens
        assert used < 1300
        proxy.stage.upstream.script = replying(COUNTED)
        assert (await proxy.ask()).status == 200


async def test_a_revoked_key_ends_at_once_even_on_an_open_connection() -> None:
    async with keyed() as proxy, connect(proxy.address, 10.0) as connection:
        request = request_bytes("POST", "/api/chat", {"model": "tiny", "messages": []}, BEARER)
        for _ in range(2):  # the second from the cached head
            await connection.send(request)
            assert (await connection.reply()).status == 200
        proxy.store.ring = KeyRing((), 0.0)
        proxy.proxy.forget_heads()
        await connection.send(request)
        assert (await connection.reply()).status == 401
        proxy.store.ring = KeyRing((KEY,), 0.0)
        proxy.proxy.forget_heads()
        await connection.send(request)
        assert (await connection.reply()).status == 200


async def test_a_long_body_of_a_limited_key_is_estimated_before_it_is_forwarded() -> None:
    async with keyed(replace(KEY, limits=KeyLimits(tokens_per_minute=1000))) as proxy:
        long = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "z" * 400_000}]}).encode()
        async with connect(proxy.address, 10.0) as connection:
            await connection.send(request_bytes("POST", "/api/chat", long, BEARER))
            assert (await connection.reply()).status == 200  # the limit was whole: a large one may use all of it
            await connection.send(request_bytes("POST", "/api/chat", long, BEARER))
            reply = await connection.reply()
        assert (reply.status, len(proxy.stage.upstream.turns)) == (429, 1)
