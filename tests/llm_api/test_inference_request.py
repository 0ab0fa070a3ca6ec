"""One request from its body to what goes to a server: aliases, fallbacks, clouds, protection, models that go."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from router.domain.actions import Grant
from router.domain.client_identity import ClientIdentity
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Ticket, TicketId
from router.errors import BadRequest, Forbidden, ModelNotFound, QueueFull, RouterError
from router.llm_api.inference_request import InferenceRequest, ModelRules, read_request, unload_reply
from router.llm_api.model_aliases import substitutes

_FALLBACKS = {"big": (("small", "tiny"), ("unknown_model", "queue_full")), "cloudy": (("x:cloud",), ("queue_full",))}
_NAMES = substitutes({"gpt-4o": "big"}, _FALLBACKS)
_RULES = ModelRules(8192, substitutes=_NAMES, heartbeat_seconds=10.0)


def facts(name: str) -> ModelFacts:
    return ModelFacts(name, "d", BlobDigest("sha256:1"), 1, "llama", 1, 1, 1, (1,), 1, 1, 1, 4096)


def request_for(
    body: dict[str, Any] | bytes, path: str = "/api/chat", rules: ModelRules = _RULES, **headers: str
) -> InferenceRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_request(rules, path, raw, named.get, ClientIdentity("192.0.2.1"))


def test_a_plain_request_stays_as_it_is() -> None:
    request = request_for({"model": "Tiny", "messages": [{"role": "user", "content": "x"}]})
    assert (request.requested_model, request.model, request.substitution_headers) == ("Tiny", "Tiny", {})
    assert request.plan_for(facts("tiny:latest")) is request.plan
    assert request.body is request.original_body
    assert request.is_repeatable is False  # these rules have aliases


@pytest.mark.parametrize(("asked", "written"), [(32_768, 8192), (4096, 8192), (8192, 8192), (2048, 2048)])
def test_a_context_of_the_same_effect_is_written_as_the_load_wrote_it(asked: int, written: int) -> None:
    """The model is trained for 4,096 tokens; servers before 0.30 would reload it for another number."""
    request = request_for({"model": "tiny", "messages": [], "options": {"num_ctx": asked, "seed": 1}})
    plan = request.plan_for(facts("tiny:latest"))
    assert plan.options == ((("num_ctx", 2048),) if asked == 2048 else ())
    assert json.loads(request.body)["options"] == {"num_ctx": written, "seed": 1}


def test_an_alias_goes_to_the_server_under_its_models_name_and_to_the_client_in_a_header() -> None:
    body = b'{ "MODEL": "gpt-4o", "model": "gpt-4o", "messages": [ ] }'
    request = request_for(body)
    assert (request.requested_model, request.model) == ("gpt-4o", "big")
    assert request.substitution_headers == {"X-Llamayard-Model": "big"}
    assert request.body == b'{ "model": "big", "messages": [ ] }'
    assert request.original_body == body


def test_a_fallback_takes_the_models_place_until_there_is_none() -> None:
    request, busy = request_for({"model": "big", "messages": []}), QueueFull("busy")
    assert request.try_fallback("queue_full", busy)
    assert json.loads(request.body)["model"] == request.model == "small"
    assert request.substitution_headers == {"X-Llamayard-Model": "small", "X-Llamayard-Fallback": "queue_full"}
    assert request.try_fallback("model_not_found")
    assert (request.model, request.substitution_headers["X-Llamayard-Fallback"]) == ("tiny", "queue_full")
    assert not request.try_fallback("queue_full", QueueFull("too"))
    assert request.error is busy


def test_a_model_nobody_has_and_nobody_replaces_leaves_its_answer_to_a_server() -> None:
    request = request_for({"model": "big"})
    assert request.try_fallback("model_not_found")
    assert request.try_fallback("model_not_found")
    assert not request.try_fallback("model_not_found")
    assert request.error is None
    assert not request_for({"model": "other"}).try_fallback("queue_full", QueueFull("busy"))


def test_an_error_without_a_fallback_is_the_clients() -> None:
    request, error = request_for({"model": "big"}), RouterError("broken")
    assert not request.try_fallback("internal_error", error)
    assert request.error is error


@pytest.mark.parametrize("name", ["x:cloud", "x:20b-cloud", "X:CLOUD"])
def test_a_cloud_model_is_refused_with_the_key_that_lets_it_through(name: str) -> None:
    with pytest.raises(Forbidden, match=r"ollama\.cloud"):
        request_for({"model": name})
    assert request_for({"model": name}, rules=ModelRules(8192, cloud=True)).model == name


def test_a_fallback_never_leads_into_a_cloud_that_is_off() -> None:
    assert not request_for({"model": "cloudy"}).try_fallback("queue_full", QueueFull("busy"))


@pytest.mark.parametrize("body", [b"", b"{bad", b"[]", b'{"prompt":"x"}', b'{"model":7}'])
def test_what_names_no_model_is_the_servers_to_refuse(body: bytes) -> None:
    request = request_for(body)
    assert (request.model, request.heartbeat, request.original_body) == ("", None, body)


def test_a_model_that_is_being_deleted_begins_nothing() -> None:
    rules = ModelRules(8192, removing={"tiny:latest"})
    with pytest.raises(ModelNotFound, match="'Tiny' not found: it is being deleted"):
        request_for({"model": "Tiny", "messages": []}, rules=rules).plan_for(facts("tiny:latest"))
    assert request_for({"model": "Tiny", "messages": []}, rules=rules).plan_for(facts("other:latest"))


def test_an_unload_is_told_from_a_load_and_is_not_kept_waiting() -> None:
    stop = request_for({"model": "tiny", "keep_alive": 0}, "/api/generate")
    assert (stop.only_unloads(), stop.heartbeat) == (True, None)
    load = request_for({"model": "tiny", "keep_alive": "5m"}, "/api/generate")
    assert (load.only_unloads(), load.heartbeat is not None) == (False, True)
    assert not request_for({"model": "tiny", "keep_alive": 0, "prompt": "x"}, "/api/generate").only_unloads()


@pytest.mark.parametrize(
    ("keep_alive", "words"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        (True, "Unsupported type: 'bool'"),
        ([1], r"Unsupported type: '\[\]interface \{\}'"),
        ({"a": 1}, r"Unsupported type: 'map\[string\]interface \{\}'"),
    ],
)
def test_a_keep_alive_that_a_server_refuses_is_refused_in_its_words(keep_alive: object, words: str) -> None:
    with pytest.raises(BadRequest, match=f"^{words}$"):
        request_for({"model": "tiny", "messages": [], "keep_alive": keep_alive}).plan_for(facts("tiny:latest"))


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/api/generate", {"model", "created_at", "response", "done", "done_reason"}),
        ("/api/chat", {"model", "created_at", "message", "done", "done_reason"}),
        ("/api/embed", {"model", "embeddings"}),
        ("/api/embeddings", {"embedding"}),
    ],
)
def test_an_unload_is_answered_in_the_form_of_its_path(path: str, members: set[str]) -> None:
    assert request_for({"model": "tiny", "keep_alive": 0}, path).only_unloads()
    assert unload_reply(path, "tiny", datetime(2026, 1, 2, tzinfo=UTC)).keys() == members


def _served(rules: ModelRules) -> dict[str, Any]:
    """The body that a copy with 8192 tokens gets from a request for 2048 that also places layers."""
    body = {"model": "tiny", "messages": [], "options": {"num_ctx": 2048, "num_gpu": 1, "seed": 1}}
    request = request_for(body, rules=rules)
    request.plan_for(facts("tiny:latest"))
    grant = Grant(TicketId(1), InstanceName("a"), "http://a", "", 0, 1, None, (), 8192)
    return json.loads(request.body_for(grant))["options"]


def test_a_protected_model_keeps_its_runner() -> None:
    assert _served(_RULES) == {"num_ctx": 8192, "seed": 1}


def test_a_model_that_passes_options_gets_them_all() -> None:
    asked_for = {"num_ctx": 2048, "num_gpu": 1, "seed": 1}
    assert _served(ModelRules(8192, passes={"registry.ollama.ai/library/tiny:latest": True})) == asked_for
    assert _served(ModelRules(8192, passes={"*": True})) == asked_for
    assert _served(ModelRules(8192, passes={"*": True, "registry.ollama.ai/library/tiny:latest": False})) != asked_for


_FORM = "multipart/form-data; boundary=b"
_FORM_BODY = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-4o\r\n--b--\r\n'


def test_a_forms_model_is_read_and_replaced_in_the_form() -> None:
    request = request_for(_FORM_BODY, "/v1/audio/transcriptions", content_type=_FORM)
    assert (request.requested_model, request.model) == ("gpt-4o", "big")
    assert request.body == _FORM_BODY.replace(b"gpt-4o", b"big")


def test_a_form_without_a_model_is_the_servers_to_refuse() -> None:
    assert request_for(b"--b--\r\n", "/v1/audio/transcriptions", content_type=_FORM).model == ""


_TRAINED = 131_072


def _ticket_for(
    path: str, prompt_bytes: int, rules: ModelRules = _RULES, trained: int = _TRAINED, **fields: Any
) -> tuple[InferenceRequest, Ticket]:
    """Of a request whose prompt's JSON has so many bytes."""
    prompt = {"/api/embed": "input", "/v1/responses": "input", "/api/embeddings": "prompt", "/api/generate": "prompt"}
    text = "x" * (prompt_bytes - 2)
    request = request_for({"model": "tiny", prompt.get(path, "messages"): text, **fields}, path, rules)
    parameters = fields.get("parameters", ())
    request.plan_for(replace(facts("tiny:latest"), context_length=trained, parameters=parameters))
    return request, request.ticket(TicketId(1), 0.0, 60.0)


_GENERATING = ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages"]


@pytest.mark.parametrize("path", _GENERATING)
def test_a_prompt_that_is_longer_than_the_context_asks_for_the_step_that_holds_it(path: str) -> None:
    for prompt_bytes, context in ((20_000, 0), (100_000, 32_768), (120_000, 65_536), (900_000, _TRAINED)):
        ticket = _ticket_for(path, prompt_bytes)[1]
        assert ticket.context_length == context
        assert ticket.options == ((("num_ctx", context),) if context else ())
        assert ticket.takes_default_context == path.startswith("/v1/")


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_the_body_of_a_raised_prompt_names_the_context_of_its_replica(path: str) -> None:
    request, _ = _ticket_for(path, 100_000)
    grant = Grant(TicketId(1), InstanceName("a"), "http://a", "", 0, 1, None, (("num_ctx", 65_536),), 65_536)
    assert json.loads(request.body_for(grant))["options"] == {"num_ctx": 65_536}
    assert not request.note_context(65_536)


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
def test_a_prompt_whose_context_was_refused_asks_for_the_default_once_and_says_so(path: str) -> None:
    request, _ = _ticket_for(path, 100_000)
    assert not request.keep_context("queue_full")
    assert request.keep_context("model_too_large")
    ticket = request.ticket(TicketId(2), 0.0, 60.0)
    assert (ticket.options, ticket.context_length) == ((), 0)
    assert request.note_context(8192)
    assert request.substitution_headers["X-Llamayard-Context"] == "8192"
    assert not request.keep_context("model_too_large")


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        ({"parameters": (("num_ctx", "4096"),)}, _RULES),
        ({}, ModelRules(8192, passes={"*": True})),
        ({}, ModelRules(8192, context_lengths={"registry.ollama.ai/library/tiny:latest": 16_384})),
        ({}, ModelRules(8192, context_length_max=8192)),
    ],
    ids=["Modelfile", "options: pass", "pinned", "context_length_max"],
)
@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
def test_a_context_that_somebody_chose_is_not_raised_and_a_longer_prompt_says_so(
    path: str, fields: dict[str, Any], rules: ModelRules
) -> None:
    request, ticket = _ticket_for(path, 100_000, rules, **fields)
    plan = request.plan
    assert plan is not None
    assert ticket.options == plan.options
    assert not request.keep_context("model_too_large")
    assert request.note_context(8192)


def test_a_context_that_the_request_names_is_its_own_affair() -> None:
    request, ticket = _ticket_for("/api/generate", 100_000, options={"num_ctx": 2048})
    assert ticket.options == (("num_ctx", 2048),)
    assert not request.note_context(2048)


def test_a_raised_context_keeps_the_other_options_of_its_request() -> None:
    ticket = _ticket_for("/api/generate", 100_000, options={"num_batch": 128})[1]
    assert ticket.options == (("num_batch", 128), ("num_ctx", 32_768))


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
def test_a_replica_with_more_context_embeds_only_texts_that_fit_into_the_named_one(path: str) -> None:
    named = {"num_ctx": 512}
    assert _ticket_for(path, 500, options=named)[1].is_flexible
    assert not _ticket_for(path, 600, options=named)[1].is_flexible
    assert _ticket_for(path, 600, trained=512, options=named)[1].is_flexible  # no replica has more
    assert _ticket_for(path, 100_000)[1].is_flexible
    assert _ticket_for(path, 100_000)[1].options == ()


def test_each_text_of_a_list_is_embedded_for_itself() -> None:
    texts = ["x" * 300] * 50
    for inputs, is_flexible in ((texts, True), ([*texts, "y" * 600], False), ([*texts, 7], False)):
        request = request_for({"model": "tiny", "input": inputs, "options": {"num_ctx": 512}}, "/api/embed")
        request.plan_for(replace(facts("tiny:latest"), context_length=_TRAINED))
        assert request.ticket(TicketId(1), 0.0, 60.0).is_flexible == is_flexible
