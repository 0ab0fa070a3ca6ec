"""Which models may be pulled, how large, and what stays free on the disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.management_rules import ManagementRules, PullWatch
from router.config.settings import Settings
from router.errors import DiskFull, Forbidden

DEFAULTS = ManagementRules(Settings().management.pull, push=Settings().management.push)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("llama3.1:8b", True),
        ("someone/model", True),
        ("registry.ollama.ai/library/tiny", True),
        ("hf.co/bartowski/Llama-3.2:Q4_K_M", True),
        ("https://hf.co/bartowski/Llama-3.2", True),
        ("evil.example/x/y", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("127.0.0.1:6379/a/b", False),
        ("hf.co.evil.example/x/y", False),
        ("registry.ollama.ai.evil.example/x/y", False),
        ("evil.example/hf.co/y", False),
        ("hf.co@evil.example/x/y", False),
        ("no valid name !", False),
        ("", False),
    ],
)
def test_by_default_only_well_known_registries_are_pulled_from(name: str, allowed: bool) -> None:
    if allowed:
        DEFAULTS.refuse_pull(name)
        return
    with pytest.raises(Forbidden, match=r"may not be pulled \(management\.pull allows: registry\.ollama\.ai/\*"):
        DEFAULTS.refuse_pull(name)


def test_nothing_is_pushed_unless_the_operator_allows_it() -> None:
    with pytest.raises(Forbidden, match=r"management\.push"):
        DEFAULTS.refuse_push()
    ManagementRules(push=True).refuse_push()


def test_a_disk_that_cannot_be_asked_refuses_nothing() -> None:
    ManagementRules(disk_free_min_bytes=10**12).check_disk(10**12)
    with pytest.raises(DiskFull) as refused:
        ManagementRules(disk_free_min_bytes=10, free_bytes=lambda: 19).check_disk(10)
    assert (refused.value.status, refused.value.code) == (507, "disk_full")


_LINES = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 400), st.integers(0, 400)), max_size=20)


@given(_LINES, st.integers(1, 1000))
def test_a_pull_goes_on_exactly_while_its_known_layers_are_small_enough(
    lines: list[tuple[str, int, int]], most: int
) -> None:
    watch, sizes = PullWatch(ManagementRules(pull_max_bytes=most)), dict[str, int]()
    for digest, total, completed in lines:
        sizes |= {digest: total} if total else {}
        if sum(sizes.values()) > most:
            with pytest.raises(Forbidden):
                watch.progressed(digest, total, completed)
            return
        watch.progressed(digest, total, completed)


def test_what_is_there_already_needs_no_room() -> None:
    watch = PullWatch(ManagementRules(disk_free_min_bytes=10, free_bytes=lambda: 100))
    watch.progressed("", 10**9, 0)
    watch.progressed("a", 1000, 910)
    with pytest.raises(DiskFull):
        watch.progressed("b", 1, 0)
