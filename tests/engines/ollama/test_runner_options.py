"""Which options of a request need another runner."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.request import RunnerOptions
from router.engines.ollama.runner_options import (
    RUNNER_OPTIONS,
    context_of,
    explicit_options,
    refused_option,
    runner_options,
    sets_num_gpu,
    slots_of,
    stored_number,
    with_context,
    written_context,
)
from tests.scheduler.builders import instance, model

PLAIN = model("m")
LONG = model("m", parameters=(("num_ctx", "4096"), ("use_mmap", "false")))
SHORT: RunnerOptions = (("num_ctx", 2048),)


def test_a_request_without_options_uses_the_default_runner() -> None:
    assert runner_options(PLAIN, {}, 8192) == ()


@pytest.mark.parametrize("asked", [{"num_ctx": 8192}, {"num_batch": 512}, {"num_thread": 0}, {"num_ctx": 8192.0}])
def test_an_explicit_default_does_not_change_the_runner(asked: dict[str, object]) -> None:
    assert runner_options(PLAIN, asked, 8192) == ()


def test_other_values_determine_the_runner_sorted_by_name() -> None:
    asked = {"use_mmap": True, "num_ctx": 2048.9, "num_batch": 128}
    assert runner_options(PLAIN, asked, 8192) == (("num_batch", 128), ("num_ctx", 2048), ("use_mmap", True))


def test_the_request_overrides_the_modelfile() -> None:
    assert runner_options(LONG, {}, 8192) == (("num_ctx", 4096), ("use_mmap", False))
    assert runner_options(LONG, {"num_ctx": 8192}, 8192) == (("use_mmap", False),)


@pytest.mark.parametrize("asked", [{"num_gpu": 0}, {"main_gpu": 1}, {"seed": 7}, {"temperature": 0.5}, {"NUM_CTX": 1}])
def test_placement_and_sampling_options_do_not_affect_the_runner(asked: dict[str, object]) -> None:
    assert runner_options(PLAIN, asked, 8192) == ()


@pytest.mark.parametrize(
    "asked",
    [
        {"num_ctx": "4096"},
        {"num_ctx": True},
        {"num_ctx": None},
        {"num_ctx": b"[1]"},
        {"use_mmap": 1},
        {"use_mmap": "no"},
    ],
)
def test_values_of_a_wrong_type_are_ignored(asked: dict[str, object]) -> None:
    assert runner_options(PLAIN, asked, 8192) == ()


@pytest.mark.parametrize(
    ("trained", "default", "in_modelfile", "asked", "options", "written"),
    [
        (2048, 8192, None, None, (), 8192),
        (2048, 8192, None, 2048, (), 8192),
        (2048, 8192, None, 32_768, (), 8192),
        (2048, 8192, None, 1024, (("num_ctx", 1024),), 1024),
        (2048, 8192, None, 1, (("num_ctx", 1),), 1),
        (2048, 8192, None, -1.5, (("num_ctx", -1),), -1),
        (2048, 8192, None, 1e300, (("num_ctx", -(2**63)),), -(2**63)),
        (2048, 1024, None, 4096, (("num_ctx", 2048),), 2048),
        (2048, 1024, None, 2048, (("num_ctx", 2048),), 2048),
        (2048, 8192, 4096, None, (), 4096),
        (2048, 8192, 4096, 8192, (), 4096),
        (2048, 1024, 4096, None, (("num_ctx", 4096),), 4096),
        (2048, 1024, 4096, 2048, (("num_ctx", 4096),), 4096),
        (2048, 1024, 4096, 1024, (), 1024),
        (131_072, 8192, 16_384, None, (("num_ctx", 16_384),), 16_384),
        (131_072, 8192, 16_384, 8192, (), 8192),
        (0, 8192, None, 32_768, (("num_ctx", 32_768),), 32_768),
    ],
)
def test_contexts_of_the_same_effect_are_one_spelling(
    trained: int, default: int, in_modelfile: int | None, asked: float | None, options: RunnerOptions, written: int
) -> None:
    """`written`: what the load says, or the server takes where it says nothing."""
    parameters = () if in_modelfile is None else (("num_ctx", str(in_modelfile)),)
    facts = model("m", context_length=trained, parameters=parameters)
    assert runner_options(facts, {} if asked is None else {"num_ctx": asked}, default) == options
    assert written_context(facts, options, default) == written
    loaded = dict(explicit_options(facts, options, default)).get("num_ctx", in_modelfile or default)
    assert loaded == written


@pytest.mark.parametrize(
    ("given", "stored"),
    [(1.9, 1), (-1.9, -1), (0.5, 0), (4096, 4096), (2**62, 2**62), (2**63 - 1, -(2**63)), (10**400, -(2**63)),
     (-(10**400), -(2**63)), (-1e300, -(2**63))],
)  # fmt: skip
def test_numbers_are_stored_as_go_converts_them(given: float, stored: int) -> None:
    assert stored_number(given) == stored


def test_the_trained_context_is_no_spelling_of_its_own_where_the_default_is_more() -> None:
    facts = model("m", context_length=2048)
    assert with_context(facts, 2048, 8192) == with_context(facts, 8192, 8192) == ()


def test_a_modelfile_may_set_num_gpu() -> None:
    assert sets_num_gpu(model("m", parameters=(("num_gpu", "10"),)))
    assert not sets_num_gpu(LONG)


@given(
    st.dictionaries(
        st.sampled_from((*RUNNER_OPTIONS, "seed", "num_gpu")),
        st.none() | st.booleans() | st.integers() | st.floats(-1e15, 1e15) | st.text(max_size=3),
    )
)
def test_requesting_the_resulting_options_again_changes_nothing(asked: dict[str, object]) -> None:
    options = runner_options(PLAIN, asked, 8192)
    assert list(options) == sorted(options)
    assert runner_options(PLAIN, dict(options), 8192) == options
    assert {name for name, _ in options} <= asked.keys() & RUNNER_OPTIONS.keys()


@pytest.mark.parametrize(
    ("options", "trained", "context"),
    [((), 131_072, 8192), ((), 2048, 2048), (SHORT, 131_072, 2048), ((("num_ctx", 10**6),), 131_072, 131_072),
     ((("num_ctx", 1),), 131_072, 4), (SHORT, 0, 2048)],
)  # fmt: skip
def test_the_context_is_the_requested_one_limited_to_the_trained_one(
    options: RunnerOptions, trained: int, context: int
) -> None:
    assert context_of(options, model("m", context_length=trained), instance("gpu0", 0)) == context


@pytest.mark.parametrize(
    ("changes", "slots"),
    [({}, 4), ({"is_embedding": True}, 1), ({"architecture": "mllama"}, 1), ({"architecture": "qwen3vl"}, 1)],
)
def test_some_models_are_served_one_request_at_a_time(changes: dict[str, Any], slots: int) -> None:
    spec = instance("gpu0", 0, slots=4)
    assert slots_of(model("m", **changes), spec) == slots


@pytest.mark.parametrize("name", ["num_ctx", "num_batch", "num_thread", "num_gpu", "main_gpu"])
@pytest.mark.parametrize("value", ["32768", "", True, b"[1]", b"{}"])
def test_an_integer_option_of_another_type_is_refused_in_the_servers_words(name: str, value: object) -> None:
    assert refused_option({name: value}) == f'option "{name}" must be of type integer'


@pytest.mark.parametrize("value", ["true", 1, 0.0, b"[]"])
def test_a_boolean_option_of_another_type_is_refused_in_the_servers_words(value: object) -> None:
    assert refused_option({"use_mmap": value}) == 'option "use_mmap" must be of type boolean'


@pytest.mark.parametrize("options", [{}, {"num_ctx": 4096.7}, {"num_gpu": -1, "use_mmap": False}, {"unknown": "x"}])
def test_options_that_a_server_accepts_are_accepted(options: dict[str, object]) -> None:
    assert refused_option(options) is None
