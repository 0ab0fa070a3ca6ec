"""JSON merge patches (RFC 7396): what has changed between two documents, as a document. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

Document = Mapping[str, Any]
"""A JSON object without null in it: in a patch, null removes a member."""


def merge_patch(old: Document, new: Document) -> dict[str, Any]:
    """The patch that makes `new` of `old`; empty where they are equal. Arrays are replaced as a whole."""
    patch = dict[str, Any].fromkeys(key for key in old if key not in new)
    for key, value in new.items():
        before = old.get(key)
        if before is value:
            continue
        if _is_object(before) and _is_object(value):
            changes = merge_patch(before, value)
            if changes:
                patch[key] = changes
        elif key not in old or type(before) is not type(value) or before != value:
            patch[key] = value
    return patch


def _is_object(value: Any) -> TypeGuard[Document]:
    return isinstance(value, dict)
