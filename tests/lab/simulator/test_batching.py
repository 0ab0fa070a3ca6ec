"""Slots, batches and prompt caches of a loaded model: against a plain simulation that does one batch after another."""

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
    """Plays requests that arrive at their own times."""
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
    """First token and end of each request, one batch after another; no caches."""
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
def test_steps_taken_at_once_end_when_they_would_one_by_one(asked: list[tuple[float, int, int]], slots: int) -> None:
    requests = [request(number, MODEL, prompt=prompt, words=words) for number, (_, prompt, words) in enumerate(asked)]
    for one, (at, _, _) in zip(requests, asked, strict=True):
        one.arrived_at = at + 0.000137 * one.id  # no two at once: who is first would decide
    expected = step_by_step(requests, slots)
    for one in served(requests, slots):
        assert (one.first_token_at, one.ended_at) == pytest.approx(expected[one.id], abs=1e-6)


def test_a_long_prompt_stalls_the_stream_beside_it() -> None:
    alone = served([request(1, MODEL, prompt=10, words=200)])[0]
    stream, long = request(1, MODEL, prompt=10, words=200), request(2, MODEL, prompt=4096, words=1)
    long.arrived_at = 1.0
    beside = served([stream, long])[0]
    assert alone.ended_at is not None
    assert beside.ended_at is not None
    # Eight batches of 512 tokens of prompt, of which each takes 0.512 s and gives the stream one word.
    assert beside.ended_at - alone.ended_at == pytest.approx(8 * 0.512, abs=0.05)


def test_a_turn_finds_its_prompt_in_the_slot_that_it_had() -> None:
    first = request(1, MODEL, prompt=1000, words=10, session=7)
    other = request(2, MODEL, prompt=1000, words=10, session=8)
    again = request(3, MODEL, prompt=1100, words=10, session=7, shared=1010)
    other.arrived_at, again.arrived_at = 5.0, 10.0
    served([first, other, again])
    assert again.ttft_seconds is not None or again.first_token_at is not None
    assert again.first_token_at == pytest.approx(10.0 + 90 * 0.001)


def test_with_one_slot_another_session_evicts_the_prompt_unless_host_memory_keeps_it() -> None:
    def again(host_cache_tokens: int) -> float:
        first = request(1, MODEL, prompt=1000, words=10, session=7)
        other = request(2, MODEL, prompt=1000, words=10, session=8)
        last = request(3, MODEL, prompt=1100, words=10, session=7, shared=1010)
        other.arrived_at, last.arrived_at = 5.0, 10.0
        served([first, other, last], slots=1, host_cache_tokens=host_cache_tokens)
        assert last.first_token_at is not None
        return last.first_token_at - 10.0

    assert again(host_cache_tokens=0) == pytest.approx(1.1)
    assert again(host_cache_tokens=100_000) == pytest.approx(0.09)


def test_a_client_that_leaves_gives_its_slot_to_the_next_after_the_step() -> None:
    timeline = Timeline()
    one = batcher(timeline, slots=1)
    leaving, next_one = request(1, MODEL, prompt=10, words=1000), request(2, MODEL, prompt=10, words=1)
    ended: list[int] = []
    one.submit(leaving, lambda r, _: ended.append(r.id))
    one.submit(next_one, lambda r, _: ended.append(r.id))
    timeline.at(1.0, lambda: ended.append(-1) if one.cancel(leaving) else None)
    while timeline.step():
        pass
    assert ended == [-1, 2]
    assert next_one.first_token_at == pytest.approx(1.0, abs=0.03)


def test_a_client_that_leaves_during_its_prompt_is_noticed_when_the_prompt_is_done() -> None:
    timeline = Timeline()
    one = batcher(timeline, slots=1)
    leaving, next_one = request(1, MODEL, prompt=4096, words=1000), request(2, MODEL, prompt=10, words=1)
    one.submit(leaving, lambda *_: None)
    one.submit(next_one, lambda *_: None)
    timeline.at(0.1, lambda: assert_true(one.cancel(leaving)))
    while timeline.step():
        pass
    assert leaving.first_token_at is None
    assert next_one.first_token_at == pytest.approx(4.096 + 0.01, abs=0.001)


def assert_true(value: bool) -> None:
    assert value
