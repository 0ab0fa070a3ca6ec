"""A pin is written into a configuration file, and nothing else in the file changes."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from router.cli.config_edit import CannotEdit, with_gpus

MODEL = "llama3.1:8b"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "\nmodels:\n  llama3.1:8b: {gpus: [1]}\n"),
        ("# a\nqueue: {limit: 3} # b", "# a\nqueue: {limit: 3} # b\n\nmodels:\n  llama3.1:8b: {gpus: [1]}\n"),
        ("models: {}  # none\n", "models: {llama3.1:8b: {gpus: [1]}}  # none\n"),
        ("models:   # none\nqueue: {}\n", "models:   # none\n  llama3.1:8b: {gpus: [1]}\nqueue: {}\n"),
        ("models: null\n", "models: {llama3.1:8b: {gpus: [1]}}\n"),
        ("models:\n  # b\n  b: {}\n", "models:\n  # b\n  llama3.1:8b: {gpus: [1]}\n  b: {}\n"),
        ("models: {b: {}}\n", "models: {llama3.1:8b: {gpus: [1]}, b: {}}\n"),
        (
            "models:\n  llama3.1:8b: {keep_warm: true}  # a\n",
            "models:\n  llama3.1:8b: {gpus: [1], keep_warm: true}  # a\n",
        ),
        (
            "models:\n  llama3.1:8b:\n    # a\n    gpus: [0, 2] # b\n",
            "models:\n  llama3.1:8b:\n    # a\n    gpus: [1] # b\n",
        ),
        (
            "models:\n  llama3.1:8b:\n    gpus:\n      - 0\n      - 2\n",
            "models:\n  llama3.1:8b:\n    gpus:\n      [1]\n",
        ),
        (
            "models:\n  llama3.1:8b:\n    gpus:\n    - 0\n  b: {}\n",
            "models:\n  llama3.1:8b:\n    gpus:\n     [1]\n  b: {}\n",
        ),
        ("models:\n  llama3.1:8b:\n    priority: 1\n", "models:\n  llama3.1:8b:\n    gpus: [1]\n    priority: 1\n"),
        ("models:\n  Library/Llama3.1:8b: {}\n", "models:\n  Library/Llama3.1:8b: {gpus: [1]}\n"),
        ("models:\n  llama3.1:8b: {gpus: }\n", "models:\n  llama3.1:8b: {gpus: [1] }\n"),
        ("models:\n  llama3.1:8b:\n    gpus:\n", "models:\n  llama3.1:8b:\n    gpus: [1]\n"),
    ],
)
def test_only_the_pin_changes(before: str, after: str) -> None:
    assert with_gpus(before, MODEL, ["1"]) == after


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{queue: {limit: 3}}\n", "its keys are in braces"),
        ("models:\n  '*': {options: pass}\n", r"models.\* applies to llama3.1:8b"),
        ("models: &a {llama3.1:8b: &r {priority: 1}, b: *r}\n", "can be edited safely"),
        ("- a\n", "is not a mapping"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_what_cannot_be_edited_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CannotEdit, match=reason):
        with_gpus(text, MODEL, ["1"])


def test_without_gpus_an_entry_is_emptied_and_none_is_made() -> None:
    assert with_gpus("queue: {}\n", MODEL, []) == "queue: {}\n"
    assert with_gpus("models: {llama3.1:8b: {gpus: ['0']}}\n", MODEL, []) == "models: {llama3.1:8b: {gpus: []}}\n"


_NAMES = st.sampled_from(["llama3.1:8b", "b", "c:d", "*", "hf.co/x/y:Q4"])
_RULES = st.dictionaries(
    st.sampled_from(["gpus", "priority", "layout"]), st.sampled_from([[], [0], ["GPU-1", 2], 3, "auto"]), max_size=3
)
_TREES = st.fixed_dictionaries(
    {}, optional={"models": st.dictionaries(_NAMES, _RULES, max_size=3), "queue": st.just({"limit": 3})}
)


@given(_TREES, st.sampled_from([None, True, False]), st.lists(st.sampled_from(["0", "1", "GPU-a b"]), unique=True))
def test_whatever_is_returned_differs_in_that_key_alone(
    tree: dict[str, object], flow: bool | None, gpus: list[str]
) -> None:
    text = "# first\n" + yaml.safe_dump(tree, default_flow_style=flow) + "# last\n"
    try:
        edited = with_gpus(text, MODEL, gpus)
    except CannotEdit:
        return
    found = yaml.safe_load(edited)
    assert edited.count("# first") == edited.count("# last") == 1
    written = [int(gpu) if gpu.isdecimal() else gpu for gpu in gpus]
    if edited != text:
        assert found["models"].pop(MODEL)["gpus"] == written
        tree.get("models", {}).pop(MODEL, None)  # type: ignore[attr-defined]
        assert found.pop("models") == tree.pop("models", {})
        assert found == tree
