"""Aliases lead to their models, and fallbacks are tried in order, for their reasons, once."""

from __future__ import annotations

from router.llm_api.model_aliases import Substitutes, substitutes

_MADE = substitutes(
    {"gpt-4o": "llama3.3:70b", "GPT-4": "llama3.3:70b"},
    {
        "llama3.3:70b": (("qwen3:32b", "qwen3:8b"), ("too_large", "queue_full")),
        "*": (("qwen3:8b",), ("unknown_model",)),
    },
)


def test_an_alias_is_found_in_every_form_of_its_name() -> None:
    assert {_MADE.target(name) for name in ("gpt-4o", "GPT-4O:latest", "library/gpt-4o")} == {"llama3.3:70b"}
    assert _MADE.target("gpt-4o:mini") is None
    assert _MADE.target("") is None


def test_a_chain_is_followed_to_its_end() -> None:
    first = _MADE.fallback_for("llama3.3:70b", ["llama3.3:70b"], "model_too_large")
    second = _MADE.fallback_for("llama3.3:70b", ["llama3.3:70b", "qwen3:32b"], "queue_full")
    assert (first, second) == ("qwen3:32b", "qwen3:8b")
    assert _MADE.fallback_for("llama3.3:70b", ["llama3.3:70b", "QWEN3:32b", "qwen3:8b"], "queue_full") is None


def test_an_alias_falls_back_as_its_model_does() -> None:
    assert _MADE.fallback_for("gpt-4o", ["gpt-4o", "llama3.3:70b"], "queue_full") == "qwen3:32b"


def test_a_reason_that_was_not_given_is_none() -> None:
    assert _MADE.fallback_for("llama3.3:70b", ["llama3.3:70b"], "model_not_found") is None
    assert _MADE.fallback_for("llama3.3:70b", ["llama3.3:70b"], "load_failed") is None


def test_a_model_without_an_entry_has_that_for_all() -> None:
    assert _MADE.fallback_for("nobody", ["nobody"], "model_not_found") == "qwen3:8b"
    assert _MADE.fallback_for("qwen3:8b", ["qwen3:8b"], "model_not_found") is None


def test_without_configuration_nothing_stands_for_anything() -> None:
    assert Substitutes().target("gpt-4o") is None
    assert Substitutes().fallback_for("a", ["a"], "queue_full") is None


def test_aliases_are_listed_only_where_that_was_asked_for() -> None:
    assert _MADE.listed == ()
    assert substitutes({"Fast": "qwen3:8b"}, {}, listed=True).listed == ("Fast",)
