"""What a page applies to its document gives the router's document."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.api.dashboard.merge_patch import merge_patch

_KEYS = st.sampled_from(["a", "b", "c", "d"])
_SCALARS = st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0]) | st.text("xy", max_size=2)
_VALUES = st.recursive(
    _SCALARS | st.lists(_SCALARS, max_size=2), lambda inner: st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)
_DOCUMENTS = st.dictionaries(_KEYS, _VALUES, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """The algorithm of RFC 7396, as the page has it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = applied(result.get(key), value)
    return result


def _typed(value: Any) -> Any:
    """Tells 1, 1.0 and true apart, which compare as equal."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    return type(value), value


@given(_DOCUMENTS, _DOCUMENTS)
def test_a_patch_makes_the_new_document_of_the_old_one(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert _typed(applied(old, merge_patch(old, new))) == _typed(new)


@given(_DOCUMENTS)
def test_nothing_is_sent_where_nothing_has_changed(document: dict[str, Any]) -> None:
    assert merge_patch(document, dict(document)) == {}


def test_only_what_has_changed_is_sent() -> None:
    old = {"models": {"a": {"slots": 2, "in_flight": 0}, "b": {"slots": 1}}, "at": 1, "gpus": [0, 1]}
    new = {"models": {"a": {"slots": 2, "in_flight": 1}, "c": {"slots": 4}}, "at": 2, "gpus": [0, 1]}
    assert merge_patch(old, new) == {"models": {"a": {"in_flight": 1}, "b": None, "c": {"slots": 4}}, "at": 2}
