"""Slots, batches and prompt caches of a model runner, compared with a reference that runs one batch at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lab.simulator.batching import Batcher, BatchParameters
from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.world import Speed
from tests.lab.simulator.machines import model, request

SPEED = Speed(step_seconds=0.01, stream_share=0.08, prefill_seconds_per_token=0.001, batch_tokens=512, is_cpu=False)
MODEL = model("m", 5)


def batcher(timeline: Timeline, slots: int = 2, host_cache_tokens: int = 0) -> Batcher:
    return Batcher(timeline, BatchParameters(SPEED, slots, host_cache_tokens), lambda _: None, lambda: 1.0)


def served(requests: list[Request], slots: int = 2, host_cache_tokens: int = 0) -> list[Request]:
    """Runs requests that arrive at their own times."""
    timeline = Timeline()
    one = batcher(timeline, slots, host_cache_tokens)

    def end(ended: Request, error: str) -> None:
        assert not error
        ended.ended_at = timeline.now

    def arrive(arriving: Request) -> None:
        one.submit(arriving, end)

    for arriving in requests:
        timeline.at(arriving.arrived_at, lambda arriving=arriving: arrive(arriving))
    while timeline.step():
        pass
    return requests


def step_by_step(requests: list[Request], slots: int) -> dict[int, tuple[float, float]]:
    """Reference: first token and end of each request, one batch at a time, without caches."""
    waiting = sorted(requests, key=lambda r: (r.arrived_at, r.id))
    running: list[list[int]] = []
    times: dict[int, tuple[float, float]] = {}
    by_id = {r.id: r for r in requests}
    first: dict[int, float] = {}
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, waiting[0].arrived_at)
        while waiting and len(running) < slots and waiting[0].arrived_at <= now + 1e-12:
            new = waiting.pop(0)
            running.append([new.id, max(1, new.prompt_tokens), 0])
        prompts = sum(min(512, left) for _, left, _ in running)
        streams = sum(left == 0 for _, left, _ in running)
        now += prompts * 0.001 + (SPEED.step(streams) if streams else 0.0)
        for entry in list(running):
            number, left, _ = entry
            if left > 0:
                entry[1] = max(0, left - 512)
                if entry[1] > 0:
                    continue
                first[number] = now
                entry[2] = min(1, by_id[number].generated_tokens)
            else:
                entry[2] += 1
            if entry[2] >= by_id[number].generated_tokens:
                times[number] = (first[number], now)
                running.remove(entry)
    return times


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 2000), st.integers(0, 300)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 3),
)
def test_merged_steps_end_at_the_same_times_as_single_steps(arrivals: list[tuple[float, int, int]], slots: int) -> None:
    requests = [
        request(number, MODEL, prompt=prompt, tokens=tokens) for number, (_, prompt, tokens) in enumerate(arrivals)
    ]
    for one, (at, _, _) in zip(requests, arrivals, strict=True):
        one.arrived_at = at + 0.000137 * one.id  # distinct arrival times, so that the order is unambiguous
    expected = step_by_step(requests, slots)
    for one in served(requests, slots):
        assert (one.first_token_at, one.ended_at) == pytest.approx(expected[one.id], abs=1e-6)


def test_a_long_prompt_stalls_a_concurrent_stream() -> None:
    alone = served([request(1, MODEL, prompt=10, tokens=200)])[0]
    stream, long = request(1, MODEL, prompt=10, tokens=200), request(2, MODEL, prompt=4096, tokens=1)
    long.arrived_at = 1.0
    concurrent = served([stream, long])[0]
    assert alone.ended_at is not None
    assert concurrent.ended_at is not None
    # Eight batches of 512 prompt tokens; each takes 0.512 s and gives the stream one token.
    assert concurrent.ended_at - alone.ended_at == pytest.approx(8 * 0.512, abs=0.05)


def test_a_turn_reuses_the_prompt_cache_of_its_previous_slot() -> None:
    first = request(1, MODEL, prompt=1000, tokens=10, session=7)
    other = request(2, MODEL, prompt=1000, tokens=10, session=8)
    again = request(3, MODEL, prompt=1100, tokens=10, session=7, shared=1010)
    other.arrived_at, again.arrived_at = 5.0, 10.0
    served([first, other, again])
    assert again.ttft_seconds is not None or again.first_token_at is not None
    assert again.first_token_at == pytest.approx(10.0 + 90 * 0.001)


def test_with_one_slot_another_session_evicts_the_prompt_unless_host_memory_keeps_it() -> None:
    def again(host_cache_tokens: int) -> float:
        first = request(1, MODEL, prompt=1000, tokens=10, session=7)
        other = request(2, MODEL, prompt=1000, tokens=10, session=8)
        last = request(3, MODEL, prompt=1100, tokens=10, session=7, shared=1010)
        other.arrived_at, last.arrived_at = 5.0, 10.0
        served([first, other, last], slots=1, host_cache_tokens=host_cache_tokens)
        assert last.first_token_at is not None
        return last.first_token_at - 10.0

    assert again(host_cache_tokens=0) == pytest.approx(1.1)
    assert again(host_cache_tokens=100_000) == pytest.approx(0.09)


def test_a_cancelled_request_frees_its_slot_after_the_step() -> None:
    timeline = Timeline()
    one = batcher(timeline, slots=1)
    leaving, next_one = request(1, MODEL, prompt=10, tokens=1000), request(2, MODEL, prompt=10, tokens=1)
    ended: list[int] = []
    one.submit(leaving, lambda r, _: ended.append(r.id))
    one.submit(next_one, lambda r, _: ended.append(r.id))
    timeline.at(1.0, lambda: ended.append(-1) if one.cancel(leaving) else None)
    while timeline.step():
        pass
    assert ended == [-1, 2]
    assert next_one.first_token_at == pytest.approx(1.0, abs=0.03)


def test_a_request_cancelled_during_prefill_ends_after_its_prompt() -> None:
    timeline = Timeline()
    one = batcher(timeline, slots=1)
    leaving, next_one = request(1, MODEL, prompt=4096, tokens=1000), request(2, MODEL, prompt=10, tokens=1)
    one.submit(leaving, lambda *_: None)
    one.submit(next_one, lambda *_: None)
    timeline.at(0.1, lambda: assert_true(one.cancel(leaving)))
    while timeline.step():
        pass
    assert leaving.first_token_at is None
    assert next_one.first_token_at == pytest.approx(4.096 + 0.01, abs=0.001)


def assert_true(value: bool) -> None:
    assert value
