"""The pending work of replicas, from grants to releases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.request import TicketId
from router.scheduler.balancing.pending_work import (
    PendingWork,
    WorkShare,
    begin,
    end,
    expected_output,
    learn,
    sample_tokens,
)
from router.scheduler.balancing.throughput import STREAM_SHARE, ThroughputModel
from tests.scheduler.builders import gpu, gpu_id, instance, key, model, ticket

M = model("m", 8000)


def share(prompt_seconds: float = 1.0, output: int = 100, samples: int = 0, concurrent: int = 0) -> WorkShare:
    return WorkShare(prompt_seconds, output, samples, concurrent)


def test_prompts_add_up_and_are_done_with_time() -> None:
    work = PendingWork()
    begin(work, share(2.0), 10.0)
    begin(work, share(1.0), 10.5)
    assert work.ahead_seconds(10.5) == 2.5
    assert work.ahead_seconds(12.0) == 1.0
    assert work.ahead_seconds(20.0) == 0.0
    assert (work.output_tokens, work.requests) == (200, 2)


def test_a_request_that_ends_before_its_first_byte_removes_its_prompt() -> None:
    work = PendingWork()
    first, second = share(2.0), share(4.0)
    begin(work, first, 10.0)
    begin(work, second, 10.0)
    end(work, second, has_begun=False, now=11.0)
    assert work.ahead_seconds(11.0) == 1.0
    end(work, first, has_begun=True, now=11.5)
    assert (work.ahead_seconds(11.5), work.output_tokens, work.requests) == (0.0, 0, 0)


@given(
    st.lists(st.tuples(st.floats(0.0, 9.0), st.booleans(), st.floats(0.0, 5.0)), max_size=20),
    st.randoms(use_true_random=False),
)
def test_no_work_is_left_when_all_requests_have_ended(
    requests: list[tuple[float, bool, float]], random: object
) -> None:
    work, now = PendingWork(), 0.0
    running: list[tuple[WorkShare, bool]] = []
    for prompt, begun, wait in requests:
        now += wait
        running.append((share(prompt), begun))
        begin(work, running[-1][0], now)
        assert work.requests == len(running)
        assert work.ahead_seconds(now) <= sum(one.prompt_seconds for one, _ in running) + 1e-6
    random.shuffle(running)  # type: ignore[attr-defined]
    for one, begun in running:
        end(work, one, begun, now)
    assert (work.ahead_seconds(now), work.output_tokens, work.requests) == (0.0, 0, 0)


def test_the_expected_output_respects_the_limit_of_the_request() -> None:
    assert expected_output(ticket(1, M)) == 256
    asked = {most: expected_output(ticket(1, M, output_tokens_max=most)) for most in (-2, -1, 0, 8, 100_000)}
    assert asked == {-2: 256, -1: 256, 0: 0, 8: 8, 100_000: 256}
    assert ticket(7, M).id == TicketId(7)


GPU_MODELS = {gpu_id(0): gpu(0, 1, clock_hertz=9_751_000_000)}
GRANTED = 1000.0


def _learned(one: WorkShare, first_after: float, ends_after: float, output_tokens: int) -> tuple[float, float]:
    """Factors by which the request made the replica's estimated prompt and step times longer."""
    speeds, spec = ThroughputModel(), instance("gpu0", 0)
    throughput = speeds.throughput(spec, M, GPU_MODELS)
    prompt, step = throughput.prompt_seconds, throughput.step_seconds
    times = (GRANTED, GRANTED + first_after, GRANTED + first_after + ends_after)
    learn(speeds, key("gpu0", M), one, times, output_tokens)
    return throughput.prompt_seconds / prompt, throughput.step_seconds / step


def test_a_stream_corrects_the_speed_of_prompts_and_steps() -> None:
    assert _learned(share(samples=4000), 60.0, 600.0, 100) == pytest.approx((1.6, 1.6))
    assert _learned(share(samples=4000), 0.0, 0.0, 100) == pytest.approx((0.8, 0.8))


def test_a_stream_as_fast_as_expected_changes_nothing() -> None:
    throughput = ThroughputModel().throughput(instance("gpu0", 0), M, GPU_MODELS)
    first, steps = 4000 * throughput.prompt_seconds + throughput.step_seconds, 99 * throughput.step_seconds
    assert _learned(share(samples=4000), first, steps, 100) == pytest.approx((1.0, 1.0))
    concurrent = share(samples=4000, concurrent=2)
    assert _learned(concurrent, first, steps * (1 + 2 * STREAM_SHARE), 100) == pytest.approx((1.0, 1.0))


def test_a_stream_without_valid_times_changes_nothing() -> None:
    assert _learned(share(samples=4000), 60.0, 600.0, 1) == (1.0, 1.0)  # it did not stream
    assert _learned(share(samples=4000), -60.0, 600.0, 100) == (1.0, 1.0)  # times of an earlier replica
    assert _learned(share(samples=0), 60.0, 600.0, 100)[0] == 1.0


def test_only_long_uncached_first_prompts_are_samples() -> None:
    assert sample_tokens(4000, 0, -1.0) == 4000
    assert sample_tokens(4000, 3000, 0.0) == 4000
    assert sample_tokens(100, 0, -1.0) == sample_tokens(4000, 5000, -1.0) == sample_tokens(4000, 0, 0.5) == 0
