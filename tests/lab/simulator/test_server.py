"""The simulated stock server behaves like a real one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from router.domain.model import ModelFacts
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.server import RUNNER_LOST, LoadResult, SimServer
from router.lab.simulator.world import WORLD, load_seconds
from tests.lab.simulator.machines import GIB, gpu, model, new_machine, play, request

SMALL = model("small", 5.0)
MIDDLE = model("middle", 9.0)
BIG = model("big", 14.0)
HUGE = model("huge", 42.0)
NEW, OLD = (0, 33, 0), (0, 24, 0)


@dataclass
class Served:
    """A server and the errors of its ended requests."""

    machine: Machine
    server: SimServer
    ended: dict[int, str] = field(default_factory=dict[int, str])

    def ask(self, at: float, number: int, facts: ModelFacts, *, tokens: int = 10) -> Request:
        submitted = request(number, facts, tokens=tokens)

        def end(one: Request, error: str) -> None:
            one.ended_at = self.machine.timeline.now
            self.ended[one.id] = error

        def arrive() -> None:
            submitted.arrived_at = self.machine.timeline.now
            self.server.submit(submitted, end)

        self.machine.timeline.at(at, arrive)
        return submitted


def server(gpus: int = 1, version: tuple[int, ...] = OLD, max_loaded: int = 0, slots: int = 2) -> Served:
    gpu_list = tuple(gpu(index) for index in range(gpus))
    machine = new_machine(*gpu_list, warm=(SMALL, MIDDLE, BIG, HUGE))
    config = ServerConfig(version=version, max_loaded=max_loaded, slots=slots)
    return Served(machine, SimServer(machine, "ollama", tuple(one.uuid for one in gpu_list), config))


def names(served: Served) -> list[str]:
    return [one.model.name for one in served.server.loaded]


@pytest.mark.parametrize(("version", "reading"), [(OLD, 0.45), (NEW, 0.2)])
def test_a_cold_request_waits_for_the_memory_reading_and_the_load(version: tuple[int, ...], reading: float) -> None:
    served = server(version=version)
    submitted = served.ask(0.0, 1, SMALL)
    play(served.machine, 60.0)
    expected = reading + load_seconds(WORLD, SMALL.weights_bytes, True, version=version)
    assert submitted.first_token_at == pytest.approx(expected, abs=0.1)
    assert served.ended == {1: ""}


def test_one_load_at_a_time_even_if_another_gpu_is_free() -> None:
    served = server(gpus=2)
    served.ask(0.0, 1, BIG)
    second = served.ask(0.1, 2, SMALL)
    play(served.machine, 60.0)
    one = 0.45 + load_seconds(WORLD, BIG.weights_bytes, True)
    assert second.first_token_at is not None
    assert second.first_token_at > one + 0.45 + load_seconds(WORLD, SMALL.weights_bytes, True) - 0.01


def test_requests_for_a_loaded_model_do_not_wait_for_a_load() -> None:
    served = server()
    served.ask(0.0, 1, SMALL)
    served.ask(10.0, 2, MIDDLE)
    passing = served.ask(10.5, 3, SMALL)
    play(served.machine, 60.0)
    assert passing.ttft_seconds == pytest.approx(0.03, abs=0.03)


def test_the_idle_model_with_the_smallest_blob_is_evicted_regardless_of_last_use() -> None:
    served = server()
    first, second = model("first", 9.0, blob="sha256:a"), model("second", 9.0, blob="sha256:b")
    served.ask(0.0, 1, second)
    served.ask(10.0, 2, first)
    served.ask(20.0, 3, BIG)
    play(served.machine, 30.0)
    assert "first" not in names(served)


def test_eviction_waits_for_a_busy_model_and_later_requests_for_it_go_first() -> None:
    served = server()
    served.ask(0.0, 1, BIG, tokens=500)
    waiting = served.ask(5.0, 2, MIDDLE)
    late = served.ask(6.0, 3, BIG, tokens=500)
    play(served.machine, 120.0)
    assert late.first_token_at is not None
    assert late.ended_at is not None
    assert waiting.first_token_at is not None
    assert late.first_token_at < 7.0
    assert waiting.first_token_at > late.ended_at


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_model_that_does_not_fit_is_partly_on_the_cpu_without_an_error(version: tuple[int, ...]) -> None:
    served = server(gpus=1, version=version)
    submitted = served.ask(0.0, 1, HUGE)
    play(served.machine, 290.0)
    assert served.ended == {1: ""}
    assert served.machine.stats.spilled_loads == 1
    assert served.server.loaded[0].size_vram_bytes < served.server.loaded[0].size_bytes
    assert (submitted.tokens_per_second or 0) < 5


def test_all_layers_on_the_gpus_overrule_the_estimate_or_fail() -> None:
    results: list[LoadResult] = []
    served = server(gpus=2)
    served.machine.timeline.at(0.0, lambda: served.server.load(HUGE, HUGE.layers + 1, results.append))
    play(served.machine, 60.0)
    assert results[0].error == ""
    assert results[0].size_vram_bytes == results[0].size_bytes
    tight = server(gpus=1)
    tight.machine.timeline.at(0.0, lambda: tight.server.load(HUGE, HUGE.layers + 1, results.append))
    play(tight.machine, 60.0)
    assert "out of memory" in results[1].error
    assert names(tight) == []


def test_thousands_may_wait_for_one_load() -> None:
    served = server()
    served.ask(0.0, 0, BIG)
    for number in range(1, 3001):
        served.ask(0.1, number, MIDDLE, tokens=0)
    play(served.machine, 600.0)
    assert served.ended == dict.fromkeys(range(3001), "")


def test_callbacks_of_loads_that_end_at_once_run_after_the_whole_queue() -> None:
    finished: list[str] = []
    served = server()
    one = served.server

    def ask() -> None:
        one.load(SMALL, -1, lambda _: finished.append("first"))
        one.load(SMALL, -1, lambda _: finished.append("second"))
        one.load(SMALL, -1, lambda _: finished.append("third"))

    served.machine.timeline.at(0.0, ask)
    play(served.machine, 60.0)
    assert finished == ["third", "second", "first"]


def test_models_are_unloaded_after_five_idle_minutes() -> None:
    served = server()
    served.ask(0.0, 1, SMALL)
    play(served.machine, 290.0)
    assert names(served) == ["small"]
    play(served.machine, 310.0)
    assert names(served) == []
    assert served.machine.ledger.used_bytes(served.server.gpus[0]) == 0


def test_no_more_models_than_the_limit() -> None:
    served = server(max_loaded=1)
    served.ask(0.0, 1, SMALL)
    served.ask(10.0, 2, MIDDLE)
    play(served.machine, 20.0)
    assert names(served) == ["middle"]


def test_a_client_that_disconnects_during_its_load_aborts_it() -> None:
    served = server()
    submitted = served.ask(0.0, 1, BIG)
    served.machine.timeline.at(1.0, lambda: served.server.cancel(submitted))
    after = served.ask(1.5, 2, SMALL)
    play(served.machine, 30.0)
    assert names(served) == ["small"]
    assert after.ttft_seconds is not None
    assert after.ttft_seconds < 0.45 + load_seconds(WORLD, SMALL.weights_bytes, True) + 0.2


def test_a_killed_server_loses_requests_and_frees_memory() -> None:
    served = server(slots=1)
    served.ask(0.0, 1, SMALL, tokens=5000)
    served.ask(3.0, 2, SMALL)
    served.ask(4.0, 3, BIG)
    served.machine.timeline.at(5.0, served.server.kill)
    play(served.machine, 6.0)
    assert served.ended == {1: RUNNER_LOST, 2: RUNNER_LOST, 3: RUNNER_LOST}
    assert served.machine.ledger.used_bytes(served.server.gpus[0]) == 0
    again = served.ask(7.0, 4, SMALL)
    play(served.machine, 20.0)
    assert again.first_token_at is not None


def test_from_0_30_memory_allocated_by_another_server_is_not_noticed() -> None:
    served = server(version=NEW)
    sibling = SimServer(served.machine, "sibling", served.server.gpus, ServerConfig(version=NEW))
    served.ask(0.0, 1, SMALL)
    served.machine.timeline.at(5.0, lambda: sibling.load(MIDDLE, -1, lambda _: None))
    served.ask(10.0, 2, model("other", 8.5))
    play(served.machine, 30.0)
    assert served.machine.ledger.out_of_memory == 1


def test_from_0_30_a_load_out_of_memory_waits_until_all_other_models_are_unloaded() -> None:
    served = server(version=NEW)
    busy = served.ask(0.0, 1, SMALL, tokens=2000)
    idle = served.ask(0.1, 2, model("idle", 2.0))
    served.machine.timeline.at(8.0, lambda: _allocate_externally(served, 14))
    submitted = served.ask(9.0, 3, model("other", 5.0))
    play(served.machine, 120.0)
    assert served.machine.ledger.out_of_memory == 1
    assert served.ended == {1: "", 2: "", 3: ""}
    assert names(served) == ["other"]
    assert idle.ended_at is not None
    assert idle.ended_at < 9.0
    assert busy.ended_at is not None
    assert submitted.first_token_at is not None
    assert submitted.first_token_at > busy.ended_at > 10.0


def _allocate_externally(served: Served, gib: int) -> None:
    """Another program allocates this much of the first GPU."""
    served.machine.ledger.external_bytes[served.server.gpus[0]] = gib * GIB
