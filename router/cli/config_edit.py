"""Sets the GPUs of one model's rule in a configuration file, and leaves every other character as it is. Pure.

The text is edited at the places that the YAML parser reports, and read again: only a result that differs in exactly
that key is returned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, cast

import yaml

from router.config.inputs import Tree, YamlLoader
from router.domain.model_names import ANY_MODEL, rule_key

_PLAIN = re.compile(r"[A-Za-z][\w./-]*(?::[\w.-]+)?")


class CannotEdit(Exception):
    """The file cannot be edited safely; the text says why."""


def with_gpus(text: str, model: str, gpus: Sequence[str]) -> str:
    """The text with `models.MODEL.gpus` set; `[]` where there are none.

    Raises:
        CannotEdit: it has a form that cannot be edited safely.
    """
    before = _tree(text)
    rules = cast("dict[str, Any]", before.get("models") or {})
    spelling = next((name for name in rules if name != ANY_MODEL and _is_same(name, model)), None)
    if spelling is None and not gpus:
        return text
    if spelling is None and ANY_MODEL in rules:
        raise CannotEdit(f"models.* applies to {model}, and would not if it had an entry of its own")
    expected = copy.deepcopy(before)
    present = cast("dict[str, object]", rules.get(spelling or model) or {})
    entry = {**present, "gpus": [int(gpu) if gpu.isdecimal() else gpu for gpu in gpus]}
    expected["models"] = {**rules, spelling or model: entry}
    edited = _edited(text, spelling, model, "[" + ", ".join(_scalar(gpu) for gpu in gpus) + "]")
    try:
        is_right = _tree(edited) == expected
    except CannotEdit:
        is_right = False
    if not is_right:
        raise CannotEdit("its form is not one that can be edited safely")
    return edited


def _tree(text: str) -> Tree:
    try:
        loaded: object = yaml.load(text, YamlLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise CannotEdit(f"it is not valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise CannotEdit("it is not a mapping")
    return cast("Tree", loaded or {})


def _is_same(one: str, other: str) -> bool:
    try:
        return rule_key(one) == rule_key(other)
    except ValueError:
        return False


def _edited(text: str, spelling: str | None, model: str, gpus: str) -> str:
    root = cast("yaml.Node | None", yaml.compose(text, YamlLoader))  # pyright: ignore[reportUnknownMemberType]
    models = _value(root, "models")
    if models is None:
        return _with_section(text, root, f"models:\n  {_scalar(model)}: {{gpus: {gpus}}}\n")
    key, value = models
    if spelling is None:
        return _with_entry(text, key, value, f"{_scalar(model)}: {{gpus: {gpus}}}")
    found = _value(value, spelling)
    assert found is not None
    name, rules = found
    present = _value(rules, "gpus")
    if present is None:
        return _with_entry(text, name, rules, f"gpus: {gpus}")
    return _replaced(text, *present, gpus)


def _value(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value of a member of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return None
    pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
    return next((pair for pair in pairs if isinstance(pair[0], yaml.ScalarNode) and pair[0].value == key), None)


def _with_section(text: str, root: yaml.Node | None, section: str) -> str:
    if isinstance(root, yaml.MappingNode) and root.flow_style:
        raise CannotEdit("its keys are in braces")
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}\n{section}"


def _with_entry(text: str, key: yaml.Node, value: yaml.Node, entry: str) -> str:
    """The text with a first member in the mapping `value`, which may be empty, of the key."""
    if not isinstance(value, yaml.MappingNode):
        if value.start_mark.index == value.end_mark.index:  # nothing after the colon
            at = _line_end(text, key.end_mark.index)
            return f"{text[:at]}\n{' ' * (key.start_mark.column + 2)}{entry}{text[at:]}"
        return _replaced(text, key, value, f"{{{entry}}}")
    if value.flow_style:
        at = value.start_mark.index + 1
        return f"{text[:at]}{entry}{', ' if value.value else ''}{text[at:]}"
    at = value.start_mark.index
    return f"{text[:at]}{entry}\n{' ' * value.start_mark.column}{text[at:]}"


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _replaced(text: str, key: yaml.Node, node: yaml.Node, new: str) -> str:
    end = node.end_mark.index
    if isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        end = cast("list[yaml.Node]", node.value)[-1].end_mark.index
    start = node.start_mark.index
    # An empty value begins right after the colon; a list may begin in its key's column, where its value may not.
    is_too_far_left = node.start_mark.line > key.start_mark.line and node.start_mark.column <= key.start_mark.column
    needs_space = start == end or is_too_far_left
    return f"{text[:start]}{' ' if needs_space else ''}{new}{text[end:]}"


def _scalar(text: str) -> str:
    if text.isdecimal():
        return str(int(text))
    return text if _PLAIN.fullmatch(text) else "'" + text.replace("'", "''") + "'"
