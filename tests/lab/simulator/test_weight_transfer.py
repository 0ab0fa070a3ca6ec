"""Duration of loads, alone and concurrent."""

from __future__ import annotations

import pytest

from router.domain.model import BlobDigest
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.weight_transfer import PageCache, WeightTransfers
from router.lab.simulator.world import WORLD, load_seconds

GB = 10**9


class Loads:
    """Starts loads and records when they end."""

    def __init__(self, warm: tuple[str, ...] = (), cache_bytes: int = 1000 * GB) -> None:
        self.timeline = Timeline()
        self.cache = PageCache(cache_bytes)
        for name in warm:
            self.cache.read(BlobDigest(name), GB)
        self.transfers = WeightTransfers(self.timeline, WORLD, self.cache)
        self.ended: dict[str, float] = {}

    def start(self, name: str, size: int = 10 * GB) -> None:
        def done() -> None:
            self.ended[name] = self.timeline.now

        self.transfers.start(BlobDigest(name), size, WORLD.load_fixed_seconds, done)

    def play(self) -> dict[str, float]:
        while self.timeline.step():
            pass
        return self.ended


@pytest.mark.parametrize("warm", [True, False])
def test_a_single_load_takes_the_time_of_the_cost_model(warm: bool) -> None:
    loads = Loads(warm=("a",) if warm else ())
    loads.start("a")
    assert loads.play() == {"a": pytest.approx(load_seconds(WORLD, 10 * GB, warm))}


def test_a_file_is_warm_after_its_first_read() -> None:
    loads = Loads()
    loads.start("a")
    loads.play()
    before = loads.timeline.now
    loads.start("a")
    assert loads.play()["a"] - before == pytest.approx(load_seconds(WORLD, 10 * GB, True))


def test_two_cold_loads_share_the_disk() -> None:
    loads = Loads()
    loads.start("a")
    loads.start("b")
    both = WORLD.load_fixed_seconds + 20 * GB / WORLD.cold_bytes_per_second
    assert loads.play() == {"a": pytest.approx(both), "b": pytest.approx(both)}


def test_two_warm_loads_run_at_full_speed_and_four_do_not() -> None:
    two, four = Loads(warm=("a", "b")), Loads(warm=("a", "b", "c", "d"))
    for name in "ab":
        two.start(name)
    for name in "abcd":
        four.start(name)
    assert two.play()["a"] == pytest.approx(load_seconds(WORLD, 10 * GB, True))
    assert four.play()["d"] == pytest.approx(WORLD.load_fixed_seconds + 40 * GB / WORLD.host_bytes_per_second)


def test_the_page_cache_evicts_the_least_recently_read_file() -> None:
    loads = Loads(cache_bytes=25 * GB)
    for name in "abc":
        loads.start(name)
        loads.play()
    assert [loads.cache.holds(BlobDigest(name)) for name in "abc"] == [False, True, True]


def test_a_slow_disk_slows_a_running_load() -> None:
    loads = Loads()
    half_read = WORLD.load_fixed_seconds + 2 * GB / WORLD.cold_bytes_per_second
    loads.start("a", 4 * GB)
    loads.timeline.at(half_read, lambda: loads.transfers.set_disk_factor(0.5))
    assert loads.play() == {"a": pytest.approx(half_read + 4 * GB / WORLD.cold_bytes_per_second)}


def test_an_aborted_load_calls_nothing_and_frees_its_bandwidth() -> None:
    loads = Loads()
    quarter_read = WORLD.load_fixed_seconds + 2 * GB / WORLD.cold_bytes_per_second
    loads.start("a", 4 * GB)
    other = loads.transfers.start(
        BlobDigest("b"), 100 * GB, WORLD.load_fixed_seconds, lambda: loads.ended.update(b=0.0)
    )
    loads.timeline.at(quarter_read, lambda: loads.transfers.abort(other))
    assert loads.play() == {"a": pytest.approx(quarter_read + 3 * GB / WORLD.cold_bytes_per_second)}
