"""One request from its body to what goes to a server: aliases, fallbacks, clouds, protection, models that go."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from router.domain.actions import Grant
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import TicketId
from router.errors import BadRequest, Forbidden, ModelNotFound, QueueFull, RouterError
from router.llm_api.inference_request import InferenceRequest, ModelRules
from router.llm_api.model_aliases import substitutes
from router.llm_api.routing_request import unloaded

_FALLBACKS = {"big": (("small", "tiny"), ("unknown_model", "queue_full")), "cloudy": (("x:cloud",), ("queue_full",))}
_NAMES = substitutes({"gpt-4o": "big"}, _FALLBACKS)
_RULES = ModelRules(8192, substitutes=_NAMES, heartbeat_seconds=10.0)


def facts(name: str) -> ModelFacts:
    return ModelFacts(name, "d", BlobDigest("sha256:1"), 1, "llama", 1, 1, 1, (1,), 1, 1, 1, 4096)


def asked(
    body: dict[str, Any] | bytes, path: str = "/api/chat", rules: ModelRules = _RULES, **headers: str
) -> InferenceRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return InferenceRequest(rules, path, raw, named.get, "192.0.2.1", dict)


def test_a_plain_request_stays_as_it_is() -> None:
    request = asked({"model": "Tiny", "messages": [{"role": "user", "content": "x"}]})
    assert (request.named, request.model, request.notes, request.body is request.original) == ("Tiny", "Tiny", {}, True)
    assert request.routing(facts("tiny:latest")).body is request.original


def test_an_alias_goes_to_the_server_under_its_models_name_and_to_the_client_in_a_header() -> None:
    body = b'{ "MODEL": "no", "model": "gpt-4o", "messages": [ ] }'
    request = asked(body)
    assert (request.named, request.model) == ("gpt-4o", "big")
    assert request.notes == {"X-Llamayard-Model": "big"}
    assert request.body == b'{ "model": "big", "messages": [ ] }'
    assert request.original == body


def test_a_fallback_takes_the_models_place_until_there_is_none() -> None:
    request, busy = asked({"model": "big", "messages": []}), QueueFull("busy")
    assert request.instead("queue_full", busy)
    assert json.loads(request.body)["model"] == request.model == "small"
    assert request.notes == {"X-Llamayard-Model": "small", "X-Llamayard-Fallback": "queue_full"}
    assert request.instead("model_not_found")
    assert (request.model, request.notes["X-Llamayard-Fallback"]) == ("tiny", "queue_full")
    assert not request.instead("queue_full", QueueFull("too"))
    assert request.error is busy


def test_a_model_nobody_has_and_nobody_replaces_leaves_its_answer_to_a_server() -> None:
    request = asked({"model": "big"})
    assert request.instead("model_not_found")
    assert request.instead("model_not_found")
    assert not request.instead("model_not_found")
    assert request.error is None
    assert not asked({"model": "other"}).instead("queue_full", QueueFull("busy"))


def test_an_error_without_a_fallback_is_the_clients() -> None:
    request, error = asked({"model": "big"}), RouterError("broken")
    assert not request.instead("internal_error", error)
    assert request.error is error


@pytest.mark.parametrize("name", ["x:cloud", "x:20b-cloud", "X:CLOUD"])
def test_a_cloud_model_is_refused_with_the_key_that_lets_it_through(name: str) -> None:
    with pytest.raises(Forbidden, match=r"ollama\.cloud"):
        asked({"model": name})
    assert asked({"model": name}, rules=ModelRules(8192, cloud=True)).model == name


def test_a_fallback_never_leads_into_a_cloud_that_is_off() -> None:
    assert not asked({"model": "cloudy"}).instead("queue_full", QueueFull("busy"))


@pytest.mark.parametrize("body", [b"", b"{bad", b"[]", b'{"prompt":"x"}', b'{"model":7}'])
def test_what_names_no_model_is_the_servers_to_refuse(body: bytes) -> None:
    request = asked(body)
    assert (request.model, request.heartbeat, request.original) == ("", None, body)


def test_a_model_that_is_being_deleted_begins_nothing() -> None:
    rules = ModelRules(8192, removing={"tiny:latest"})
    with pytest.raises(ModelNotFound, match="'Tiny' not found: it is being deleted"):
        asked({"model": "Tiny", "messages": []}, rules=rules).routing(facts("tiny:latest"))
    assert asked({"model": "Tiny", "messages": []}, rules=rules).routing(facts("other:latest"))


def test_an_unload_is_told_from_a_load_and_is_not_kept_waiting() -> None:
    stop = asked({"model": "tiny", "keep_alive": 0}, "/api/generate")
    assert (stop.unloads(), stop.heartbeat) == (True, None)
    load = asked({"model": "tiny", "keep_alive": "5m"}, "/api/generate")
    assert (load.unloads(), load.heartbeat is not None) == (False, True)
    assert not asked({"model": "tiny", "keep_alive": 0, "prompt": "x"}, "/api/generate").unloads()


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
        asked({"model": "tiny", "messages": [], "keep_alive": keep_alive}).routing(facts("tiny:latest"))


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
    assert asked({"model": "tiny", "keep_alive": 0}, path).unloads()
    assert unloaded(path, "tiny", datetime(2026, 1, 2, tzinfo=UTC)).keys() == members


def _served(rules: ModelRules) -> dict[str, Any]:
    """The body that a copy with 8192 tokens gets from a request for 2048 that also places layers."""
    body = {"model": "tiny", "messages": [], "options": {"num_ctx": 2048, "num_gpu": 1, "seed": 1}}
    routing = asked(body, rules=rules).routing(facts("tiny:latest"))
    grant = Grant(TicketId(1), InstanceName("a"), "http://a", "", 0, 1, None, (), 8192)
    return json.loads(routing.body_for(grant))["options"]


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
    request = asked(_FORM_BODY, "/v1/audio/transcriptions", content_type=_FORM)
    assert (request.named, request.model) == ("gpt-4o", "big")
    assert request.body == _FORM_BODY.replace(b"gpt-4o", b"big")


def test_a_form_without_a_model_is_the_servers_to_refuse() -> None:
    assert asked(b"--b--\r\n", "/v1/audio/transcriptions", content_type=_FORM).model == ""
