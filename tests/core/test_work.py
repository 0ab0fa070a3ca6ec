"""What copies have been given to do, from grants to releases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.core.entities import TicketId
from router.core.speeds import Pace, Speeds
from router.core.work import Share, Work, begin, end, expected_output, learn
from tests.core.builders import card, gpu_id, instance, key, model, ticket

PACE = Pace(prompt_seconds=0.001, step_seconds=0.01)
M = model("m", 8000)


def share(work: Work, prompt: int = 1000, output: int = 100, pace: Pace = PACE, *, is_cold: bool = True) -> Share:
    return Share(work, pace, work.ahead_seconds(0.0), prompt, is_cold, output, work.requests)


def test_prompts_queue_up_and_are_worked_off_by_time() -> None:
    work = Work()
    begin(share(work, 2000), 10.0)
    begin(share(work, 1000), 10.5)
    assert work.ahead_seconds(10.5) == 2.5
    assert work.ahead_seconds(12.0) == 1.0
    assert work.ahead_seconds(20.0) == 0.0
    assert (work.output_tokens, work.requests) == (200, 2)


def test_who_leaves_before_his_first_byte_takes_his_prompt_with_him() -> None:
    work = Work()
    first, second = share(work, 2000), share(work, 4000)
    begin(first, 10.0)
    begin(second, 10.0)
    end(second, has_begun=False, now=11.0)
    assert work.ahead_seconds(11.0) == 1.0
    end(first, has_begun=True, now=11.5)
    assert (work.ahead_seconds(11.5), work.output_tokens, work.requests) == (0.0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans(), st.floats(0.0, 5.0)), max_size=20), st.randoms())
def test_when_all_have_left_nothing_is_left_to_do(requests: list[tuple[int, bool, float]], random: object) -> None:
    work, now = Work(), 0.0
    running: list[tuple[Share, bool]] = []
    for prompt, begun, wait in requests:
        now += wait
        running.append((share(work, prompt), begun))
        begin(running[-1][0], now)
        assert work.requests == len(running)
        assert 0.0 <= work.ahead_seconds(now) <= sum(one.prompt_seconds for one, _ in running) + 1e-6
    random.shuffle(running)  # type: ignore[attr-defined]
    for one, begun in running:
        end(one, begun, now)
        assert work.ahead_seconds(now) >= 0.0
    assert (work.ahead_seconds(now), work.output_tokens, work.requests) == (0.0, 0, 0)


def test_an_answer_is_expected_to_be_no_longer_than_it_may_be() -> None:
    assert expected_output(ticket(1, M)) == 256
    asked = {most: expected_output(ticket(1, M, output_tokens_max=most)) for most in (-2, -1, 0, 8, 100_000)}
    assert asked == {-2: 256, -1: 256, 0: 0, 8: 8, 100_000: 256}
    assert ticket(7, M).id == TicketId(7)


CARDS = {gpu_id(0): card(0, 1, clock_hertz=9_751_000_000)}


def _paces(one: Share, times: tuple[float, float, float], output_tokens: int) -> tuple[float, float]:
    """By how much the copy is taken to be slower after the request than before."""
    speeds, spec = Speeds(), instance("gpu0", 0)
    before = speeds.pace(spec, M, CARDS)
    learn(speeds, key("gpu0", M), one._replace(pace=before), times, output_tokens)
    after = speeds.pace(spec, M, CARDS)
    return after.prompt_seconds / before.prompt_seconds, after.step_seconds / before.step_seconds


def test_a_stream_shows_how_fast_prompts_and_steps_are() -> None:
    prompt, step = _paces(share(Work(), 4000), (0.0, 60.0, 600.0), 100)
    assert prompt > 1.5
    assert step > 1.5
    prompt, step = _paces(share(Work(), 4000), (0.0, 0.001, 0.002), 100)
    assert prompt < 0.9
    assert step < 0.9


def test_what_shows_nothing_teaches_nothing() -> None:
    late = (0.0, 60.0, 600.0)
    assert _paces(share(Work(), 4000), late, 1) == (1.0, 1.0)  # it did not stream
    assert _paces(share(Work(), 4000), (60.0, 0.0, 600.0), 100) == (1.0, 1.0)  # the clock of another life
    assert _paces(share(Work(), 100), late, 100)[0] == 1.0  # too short
    assert _paces(share(Work(), 4000, is_cold=False), late, 100)[0] == 1.0  # the cache may have held more, or less
