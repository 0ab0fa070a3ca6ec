"""A Modelfile's own options of the runner: the copy that is loaded has them, and no request of the model reloads it."""

from __future__ import annotations

import pytest

from router.domain.events import LoadedModel, ResidencyRead
from router.domain.instance import InstanceName
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy
from router.domain.request import RunnerOptions
from router.engines.ollama.runner_options import default_runner_options, explicit_options, runner_options, with_context
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized

OWN = (("num_ctx", "4096"), ("num_thread", "1"), ("use_mmap", "false"))
WRITTEN = sized("written", 10, parameters=OWN, context_length=131_072)
KEPT: RunnerOptions = (("num_thread", 1), ("use_mmap", False))
"""Of those, what the router has no opinion on."""


def _served_as(of: ModelFacts, load: RunnerOptions, request: dict[str, object]) -> RunnerOptions:
    """The runner that a server with 8,192 tokens takes: the request's options over the Modelfile's."""
    return runner_options(of, {**request, **dict(load)}, 8192)


def test_what_the_modelfile_says_stays_but_for_the_context() -> None:
    assert with_context(WRITTEN, 8192, 8192) == KEPT
    assert with_context(WRITTEN, 16384, 8192) == (("num_ctx", 16384), *KEPT)
    assert with_context(sized("plain", 10), 8192, 8192) == ()


def test_a_load_for_nobody_in_particular_has_the_pinned_context_or_else_the_modelfile_s() -> None:
    plain = sized("plain", 10, context_length=131_072)
    assert (
        default_runner_options(WRITTEN, None, 8192)
        == default_runner_options(WRITTEN, Pin(), 8192)
        == (("num_ctx", 4096), *KEPT)
    )
    assert default_runner_options(WRITTEN, Pin(context_length=8192), 8192) == KEPT
    assert default_runner_options(plain, None, 8192) == ()
    assert default_runner_options(plain, Pin(context_length=16_384), 8192) == (("num_ctx", 16_384),)


@pytest.mark.parametrize("options", [(), KEPT, (("num_ctx", 2048),), (("num_batch", 64), ("num_thread", 3))])
def test_a_load_that_spells_its_options_out_gets_a_runner_that_is_so(options: RunnerOptions) -> None:
    load = explicit_options(WRITTEN, options, 8192)
    wanted = dict(options)
    found = dict(_served_as(WRITTEN, load, {}))
    assert found.pop("use_mmap") is False  # it has no default that could be named
    wanted.pop("use_mmap", None)
    assert found == wanted
    assert explicit_options(sized("plain", 10), options, 8192) == options


@pytest.fixture
def one() -> Play:
    return Play(1, Policy(vram_margin_bytes=0, context_length=8192)).begin()


@pytest.mark.parametrize("is_flexible", [True, False])
def test_a_model_is_loaded_as_its_modelfile_says_and_every_api_is_served_by_that(one: Play, is_flexible: bool) -> None:
    ordinary = runner_options(WRITTEN, {}, 8192)
    ticket = one.arrive(WRITTEN, options=ordinary, is_flexible=is_flexible)
    (load,) = one.loads.values()
    assert load.options == (("num_ctx", 4096), *KEPT)
    one.work_through()
    assert ticket in one.leases
    loaded = one.residency("gpu0", WRITTEN)
    assert loaded is not None
    assert (loaded.options, loaded.context_length) == ((("num_ctx", 4096), *KEPT), 4096)
    assert one.arrive(WRITTEN, options=ordinary, is_flexible=not is_flexible) in one.leases
    assert one.loads_sent == 1


def test_who_asks_for_more_context_than_the_modelfile_says_gets_the_next_step(one: Play) -> None:
    one.arrive(WRITTEN, options=runner_options(WRITTEN, {"num_ctx": 5000}, 8192), is_flexible=True)
    (load,) = one.loads.values()
    assert load.options == (("num_ctx", 8192), *KEPT)


def test_what_somebody_else_loaded_is_taken_to_be_as_its_modelfile_says(one: Play) -> None:
    row = LoadedModel(WRITTEN.name, "", 10, 10, 4096, WRITTEN)
    one.post(ResidencyRead(InstanceName("gpu0"), (row,), one.now))
    found = one.residency("gpu0", WRITTEN)
    assert found is not None
    assert found.options == runner_options(WRITTEN, {}, 8192)
    one.held[key("gpu0", WRITTEN)] = {}
    assert one.arrive(WRITTEN, options=runner_options(WRITTEN, {}, 8192), is_flexible=False) in one.leases
    assert one.loads_sent == 0
