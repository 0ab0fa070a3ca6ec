"""Small models on the CPU: which requests are served there, which copies are kept, and that nothing else uses them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.actions import Action
from router.domain.events import GpusRead, LoadFinished
from router.domain.explanation import Outcome
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceState
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import ModelFacts
from router.domain.policy import CpuOverflow, Pin, Policy
from router.domain.request import Layout, LayoutKind
from router.domain.residency import ResidencyState
from router.domain.snapshot import Demand, Snapshot
from router.scheduler.placement.cpu_overflow import copy_to_load, corrected, host_bytes, is_fast, serve, to_unload
from tests.scheduler.builders import by_weight, gpu, instance, key, model, residency, snapshot, ticket, view
from tests.scheduler.play import Play, sized

CPU = InstanceName("cpu-overflow")
SMALL, OTHER, LARGE = sized("small", 10), sized("other", 8), sized("large", 40)
FAST, SLOW = MeasuredSpeed(0.01, 0.05), MeasuredSpeed(0.01, 0.5)
OVERFLOW = CpuOverflow(memory_margin_bytes=0)
MIB = 1024**2


@dataclass(slots=True)
class CpuPlay(Play):
    """Two GPUs and an instance for CPU overflow."""

    speed: MeasuredSpeed | None = FAST
    host_bytes: int = 200

    def __post_init__(self) -> None:
        Play.__post_init__(self)
        self.specs[CPU] = replace(instance(CPU), is_overflow=True)

    def read_gpus(self, progress: float = 1.0) -> list[Action]:
        gpus = tuple(self._gpu(number, progress) for number in range(self.gpus))
        return self.post(GpusRead(gpus, self.now, self.host_bytes))

    def finish_load(self, load: LoadId, on_cpu: int = 0) -> list[Action]:
        if not self.loads[load].measures_speed:
            return Play.finish_load(self, load, on_cpu)
        sent = self.loads.pop(load)
        return self.post(LoadFinished(load, sent.model.weights_bytes, 0, self.speed))


def serve_once(play: Play, of: ModelFacts) -> None:
    ticket_id = play.arrive(of)
    play.work_through()
    play.release(ticket_id)


def begun(**changes: object) -> CpuPlay:
    """The small model is loaded on a GPU and was requested often; the router then has a pause."""
    policy = Policy(vram_margin_bytes=0, cpu=OVERFLOW)
    play = CpuPlay(2, replace(policy, **changes.pop("policy", {})), **changes)  # type: ignore[arg-type]
    play.begin()
    for _ in range(2):
        serve_once(play, SMALL)
    pause(play)
    return play


def pause(play: CpuPlay) -> None:
    for _ in range(3):
        play.now += 1.0
        play.read_gpus()
        play.work_through()


def large_runs(play: CpuPlay) -> None:
    """The large model holds both GPUs, and answers."""
    ticket_id = play.arrive(LARGE)
    for _ in range(100):
        if ticket_id in play.leases:
            return
        play.advance(1.0)
        play.work_through()
    raise AssertionError(play.reason(ticket_id))


def test_a_request_that_a_busy_large_model_would_delay_is_served_on_the_cpu_and_the_next_on_a_gpu() -> None:
    play = begun()
    assert play.state(CPU, SMALL) is ResidencyState.READY
    large_runs(play)
    shown = play.explain(SMALL)
    assert (shown.outcome, shown.instance) == (Outcome.SERVE, CPU)
    assert "on the CPU meanwhile" in shown.reason
    first = play.arrive(SMALL)
    assert play.grant(first).instance == CPU
    assert play.grant(first).reason.startswith("on the CPU meanwhile: the GPUs would be late")
    second = play.arrive(SMALL)
    assert second in play.queued(), "one request at a time: the measured speed holds for one"
    for lease in list(play.leases):
        if play.grant(lease).instance != CPU:
            play.release(lease)
    for _ in range(100):
        play.advance(1.0)
        play.work_through()
    assert play.grant(second).instance in ("gpu0", "gpu1")


def test_while_a_gpu_is_in_time_nothing_is_served_on_the_cpu() -> None:
    play = begun()
    assert play.grant(play.arrive(SMALL)).instance in ("gpu0", "gpu1")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"speed": SLOW}, "too slow to read along"),
        ({"speed": None}, "its speed could not be measured"),
        ({"host_bytes": 19}, "beside the file in the page cache there is no room for a copy"),
        ({"policy": {"cpu": None}}, "off"),
        ({"policy": {"pins": {"small:latest": Pin(cpu=True)}}}, "an instance for overflow serves no pinned model"),
    ],
)
def test_no_copy_stays_where_it_would_not_help_or_is_not_allowed(changes: dict[str, object], why: str) -> None:
    if "policy" in changes and "pins" in changes["policy"]:  # type: ignore[operator]
        play = CpuPlay(2, Policy(vram_margin_bytes=0, cpu=OVERFLOW, pins={"small": Pin(cpu=True)}))
        play.begin()
        assert play.rejection(play.arrive(SMALL)).code == "model_too_large", why
        return
    play = begun(**changes)
    assert play.state(CPU, SMALL) is None, why


def test_a_model_that_was_too_slow_is_not_loaded_there_again() -> None:
    play = begun(speed=SLOW)
    sent = play.loads_sent
    pause(play)
    assert play.loads_sent == sent


def test_copies_leave_when_other_programs_need_the_memory() -> None:
    play = begun(policy={"cpu": CpuOverflow(memory_margin_bytes=50)})
    assert play.state(CPU, SMALL) is ResidencyState.READY
    play.host_bytes = 49
    pause(play)
    assert play.state(CPU, SMALL) is None


def test_a_server_that_is_down_or_drained_serves_nothing() -> None:
    play = begun()
    large_runs(play)
    play.change_instance(CPU, InstanceState.BACKOFF, "died")
    assert play.arrive(SMALL) in play.queued()
    again = begun()
    again.drain(instance=CPU)
    large_runs(again)
    assert again.arrive(SMALL) in again.queued()


def test_a_copy_is_no_replica_to_placement() -> None:
    """Evicting the model from its GPU costs as much as without the copy, and it is loaded there again."""
    play = begun()
    large_runs(play)
    ticket_id = play.arrive(SMALL)
    assert play.grant(ticket_id).instance == CPU
    play.release(ticket_id)
    for lease in list(play.leases):
        play.release(lease)
    serve_once(play, SMALL)
    assert ResidencyState.READY in (play.state("gpu0", SMALL), play.state("gpu1", SMALL))


def test_a_request_for_another_layout_is_not_served_there() -> None:
    play = begun()
    large_runs(play)
    assert play.arrive(SMALL, layout=Layout(LayoutKind.SINGLE)) in play.queued()


# --- the decision --------------------------------------------------------------------------------------------------

COPY = model("copy", 1000)


def facts(
    speed: MeasuredSpeed, *, in_flight: int = 0, host_mib: int = 100_000, policy: Policy | None = None
) -> Snapshot:
    there = replace(view(CPU), spec=replace(instance(CPU), is_overflow=True))
    found = snapshot(
        [gpu(0, 0)],
        [view("gpu0", 0), there],
        [replace(residency(CPU, COPY, in_flight=in_flight), loaded_at=-1.0)],
        policy=policy or Policy(cpu=CpuOverflow()),
    )
    often = Demand(weight=100.0, at=found.now)
    return replace(found, cpu_speeds={COPY.blob: speed}, host_free_bytes=host_mib * MIB, demand={COPY.blob: often})


seconds = st.floats(0.0, 60.0)


@given(
    st.floats(1e-4, 0.5), st.floats(1e-3, 1.0), st.integers(0, 4000), seconds, st.none() | seconds, st.integers(0, 1)
)
def test_who_is_served_on_the_cpu_is_late_on_the_gpus_and_in_time_there(
    prompt: float, step: float, tokens: int, waited: float, wait: float | None, in_flight: int
) -> None:
    speed, request = MeasuredSpeed(prompt, step), ticket(1, COPY, arrived_at=1000.0 - waited, prompt_tokens=tokens)
    found = serve(facts(speed, in_flight=in_flight), request, wait)
    target, first = 10.0, tokens * prompt + step
    if found is not None:
        assert in_flight == 0
        assert step <= 1 / 7
        assert waited + first <= target
        assert wait is None or waited + wait > target
        assert wait is None or first < wait
    elif not in_flight and step <= 1 / 7 and waited + 1.25 * first <= target:
        assert wait is not None
        assert waited + wait <= target or wait <= 1.25 * first


@given(st.integers(0, 20_000), st.integers(0, 8_000), st.lists(st.integers(1, 9_000), min_size=1, max_size=5))
def test_a_copy_is_loaded_only_where_host_memory_is_free_beside_the_files_of_all_models(
    host_mib: int, margin_mib: int, sizes: list[int]
) -> None:
    policy = Policy(cpu=CpuOverflow(memory_margin_bytes=margin_mib * MIB))
    found = facts(FAST, host_mib=host_mib, policy=policy)
    models = {each.blob: each for number, size in enumerate(sizes) if (each := model(f"m{number}", size))}
    found = replace(found, demand=dict.fromkeys(models, Demand(weight=100.0, at=found.now)))
    chosen = copy_to_load(found, models, set(), by_weight)
    cached = sum(each.weights_bytes for each in models.values())
    room = (host_mib - margin_mib) * MIB - cached
    spec = found.instances[CPU].spec
    if chosen is None:
        assert all(host_bytes(found, by_weight, each, spec) > room for each in models.values())
    else:
        assert chosen[1].instance == CPU
        assert host_bytes(found, by_weight, chosen[0], spec) <= room


def test_no_copy_is_loaded_before_the_memory_was_read_after_the_last_one() -> None:
    found, models = facts(FAST), {OTHER.blob: OTHER}
    found = replace(found, demand=dict.fromkeys(models, Demand(weight=100.0, at=found.now)))
    assert copy_to_load(found, models, set(), by_weight) is not None
    assert copy_to_load(replace(found, gpus_read_at=-1.0), models, set(), by_weight) is None
    assert copy_to_load(replace(found, host_free_bytes=None), models, set(), by_weight) is None
    assert copy_to_load(found, models, {OTHER.blob}, by_weight) is None


def test_what_is_not_allowed_any_more_is_unloaded() -> None:
    off = facts(FAST, policy=Policy())
    assert list(to_unload(off)) == [(key(CPU, COPY), "placement.cpu is never")]
    assert list(to_unload(facts(FAST))) == []
    assert list(to_unload(facts(FAST, in_flight=1, policy=Policy()))) == []


@given(st.floats(1e-4, 1.0), st.floats(1e-3, 1.0), st.integers(1, 2000), st.integers(2, 500))
def test_a_speed_comes_nearer_to_what_answers_show(prompt: float, step: float, tokens: int, output: int) -> None:
    known = MeasuredSpeed(0.01, 0.1)
    times = (0.0, prompt * tokens, prompt * tokens + step * (output - 1))
    found = corrected(known, tokens, output, times)
    assert abs(found.step_seconds - step) <= abs(known.step_seconds - step) + 1e-9
    assert known.prompt_seconds <= found.prompt_seconds <= max(known.prompt_seconds, prompt) + 1e-9


def test_fast_means_as_fast_as_people_read() -> None:
    assert is_fast(OVERFLOW, MeasuredSpeed(1.0, 1 / 7))
    assert not is_fast(OVERFLOW, MeasuredSpeed(1.0, 1 / 6))
    assert not is_fast(OVERFLOW, None)
