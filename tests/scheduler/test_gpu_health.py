"""GPUs that fail or are too hot: what becomes of their instances and models, and how they come back."""

from __future__ import annotations

import pytest

from router.domain.gpu_faults import XIDS
from router.domain.request import TicketId
from router.domain.residency import ResidencyState
from tests.scheduler.builders import gpu_id, key
from tests.scheduler.play import Play, sized

SMALL, WHOLE, PAIR = sized("small", 6), sized("whole", 20), sized("pair", 40)
GPU0 = gpu_id(0)
OF_GPU = sorted(code for code, xid in XIDS.items() if xid.is_of_gpu)
OF_PROGRAM = sorted(code for code, xid in XIDS.items() if not xid.is_of_gpu)


@pytest.fixture
def two() -> Play:
    return Play(2).begin()


def _read(play: Play, seconds: float = 1.0) -> None:
    play.now += seconds
    play.read_gpus()


def _states(play: Play) -> dict[str, str]:
    return {name: view.state.value for name, view in play.snapshot().instances.items()}


def _events(play: Play) -> list[str]:
    return [notice.event for notice in play.notices]


def test_the_classes_of_xids_are_those_of_the_documentation() -> None:
    assert OF_PROGRAM == [13, 31, 43, 45]
    assert OF_GPU == [48, 62, 63, 64, 74, 79, 94, 95, 119, 120]


@pytest.mark.parametrize("code", OF_GPU)
def test_an_error_of_the_gpu_drains_it_and_everything_over_it(two: Play, code: int) -> None:
    two.xids[GPU0] = (code,)
    _read(two)
    assert _states(two) == {"gpu0": "draining", "gpu1": "ready", "spread": "draining"}
    assert f"reported XID {code} (" in two.snapshot().instances[key("gpu0", SMALL)[0]].reason
    refused = two.rejection(two.arrive(PAIR))
    assert (refused.code, f"XID {code}" in refused.message) == ("no_instance", True)
    ticket = two.arrive(WHOLE)
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


@pytest.mark.parametrize("code", [*OF_PROGRAM, 999])
def test_an_error_of_a_program_is_only_logged(two: Play, code: int) -> None:
    two.xids[GPU0] = (code,)
    _read(two)
    assert set(_states(two).values()) == {"ready"}
    assert _events(two) == ["gpu_xid"]


def test_what_runs_on_a_faulty_gpu_may_end_and_its_models_leave(two: Play) -> None:
    ticket = two.arrive(WHOLE)
    two.work_through()
    assert two.grant(ticket).instance == "gpu0"
    two.xids[GPU0] = (95,)
    _read(two)
    assert not two.unloads
    two.release(ticket)
    assert list(two.unloads) == [key("gpu0", WHOLE)]


def test_a_new_uncorrectable_ecc_error_drains_the_gpu_and_old_ones_do_not() -> None:
    two = Play(2, ecc_errors={GPU0: 7}).begin()
    _read(two)
    assert set(_states(two).values()) == {"ready"}
    two.ecc_errors[GPU0] = 8
    _read(two)
    assert _states(two)["gpu0"] == "draining"


def test_after_a_while_without_errors_it_takes_one_load_alone_first(two: Play) -> None:
    two.xids[GPU0] = (48,)
    _read(two)
    _read(two, 301.0)
    assert "gpu_on_probation" in _events(two)
    assert _states(two)["gpu0"] == "ready"
    pair = two.arrive(PAIR)
    assert "a GPU that is back" in two.reason(pair)
    small = two.arrive(SMALL)
    assert two.state("gpu0", SMALL) is ResidencyState.LOADING or two.state("gpu1", SMALL) is ResidencyState.LOADING
    for _ in range(3):
        _read(two)
        for load in list(two.loads):
            two.finish_load(load)
    assert "gpu_fit_again" in _events(two)
    assert two.snapshot().probation == frozenset()
    two.release(small)
    two.work_through()
    two.advance(80.0)
    two.work_through()
    assert two.grant(pair).instance == "spread"


def test_a_first_load_that_fails_takes_it_out_for_longer(two: Play) -> None:
    two.release(_served(two))
    two.xids[GPU0] = (48,)
    _read(two)
    two.work_through()
    _read(two, 301.0)
    assert [load.instance for load in two.loads.values()] == ["gpu0"]
    two.fail_load(next(iter(two.loads)))
    assert _states(two)["gpu0"] == "draining"
    assert two.notices[-1].fields["seconds"] == 600.0


def _served(play: Play) -> TicketId:
    ticket = play.arrive(SMALL)
    play.work_through()
    play.grant(ticket)
    return ticket


def test_a_probation_without_loads_ends_by_itself(two: Play) -> None:
    two.xids[GPU0] = (48,)
    _read(two)
    _read(two, 301.0)
    _read(two, 31.0)
    ticket = two.arrive(PAIR)
    two.work_through()
    assert two.grant(ticket).instance == "spread"


def test_where_no_model_fits_on_it_alone_a_load_over_several_gpus_is_the_test(two: Play) -> None:
    two.xids[GPU0] = (48,)
    _read(two)
    _read(two, 301.0)
    ticket = two.arrive(PAIR)
    _read(two)
    assert two.snapshot().tested_in_sets == {GPU0}
    two.work_through()
    assert two.grant(ticket).instance == "spread"
    assert "gpu_fit_again" in _events(two)
    assert two.snapshot().probation == two.snapshot().tested_in_sets == frozenset()


def test_a_set_does_not_test_a_gpu_that_a_smaller_model_can_test(two: Play) -> None:
    two.release(_served(two))
    two.xids[GPU0] = (48,)
    _read(two)
    two.work_through()
    _read(two, 300.0)
    ticket = two.arrive(PAIR)
    _read(two, 1.0)
    assert [(load.instance, load.model.name) for load in two.loads.values()] == [("gpu0", "small")]
    assert two.snapshot().tested_in_sets == frozenset()
    assert "a GPU that is back" in two.reason(ticket)


def test_an_operator_resumes_a_faulty_gpu_at_once(two: Play) -> None:
    two.xids[GPU0] = (79,)
    _read(two)
    two.drain(gpu=0, resume=True)
    assert _states(two)["gpu0"] == "ready"
    assert two.snapshot().probation == {GPU0}


def test_a_hot_gpu_is_avoided_and_still_used_where_no_other_can_be(two: Play) -> None:
    two.celsius[GPU0] = 86
    _read(two)
    first, second = two.arrive(WHOLE), two.arrive(sized("other", 20))
    two.work_through()
    assert (two.grant(first).instance, two.grant(second).instance) == ("gpu1", "gpu0")
    two.celsius[GPU0] = 82
    _read(two)
    assert two.snapshot().hot == {GPU0}
    two.celsius[GPU0] = 79
    _read(two)
    assert two.snapshot().hot == frozenset()


@pytest.mark.parametrize("reason", ["hw_power_brake_slowdown", "hw_thermal_slowdown"])
def test_a_gpu_that_is_slowed_down_by_heat_or_power_counts_as_hot(two: Play, reason: str) -> None:
    two.throttled[GPU0] = (reason,)
    _read(two)
    assert two.snapshot().hot == {GPU0}
    two.throttled[GPU0] = ("sw_power_cap",)
    _read(two)
    assert two.snapshot().hot == frozenset()


def test_a_gpu_that_is_too_hot_for_long_is_drained_until_it_has_cooled_down(two: Play) -> None:
    two.celsius[GPU0] = 92
    _read(two)
    _read(two, 20.0)
    assert _states(two)["gpu0"] == "ready"
    _read(two, 11.0)
    assert _states(two)["gpu0"] == "draining"
    assert two.snapshot().instances[key("gpu0", SMALL)[0]].reason == "GPU 0 is at 92 °C"
    two.celsius[GPU0] = 84
    _read(two, 60.0)
    assert _states(two)["gpu0"] == "draining"
    two.celsius[GPU0] = 79
    _read(two)
    assert set(_states(two).values()) == {"ready"}


def test_a_short_peak_changes_nothing(two: Play) -> None:
    for celsius in (92, 88, 92, 88):
        two.celsius[GPU0] = celsius
        _read(two, 20.0)
    assert _states(two)["gpu0"] == "ready"


def test_a_gpu_that_was_lost_for_long_is_on_probation(two: Play) -> None:
    two.lost.add(GPU0)
    _read(two)
    two.lost.clear()
    _read(two, 60.0)
    assert two.snapshot().probation == {GPU0}
