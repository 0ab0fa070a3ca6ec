"""VRAM accounting: no byte is counted twice or missed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.gpu import Gpu, GpuProcess
from router.domain.ids import LoadId
from router.domain.policy import Policy
from router.domain.residency import ResidencyState
from router.domain.vram_ledger import (
    available_bytes,
    capacity_bytes,
    external_bytes,
    is_settled,
    process_bytes,
    reserved_bytes,
    resident_bytes,
    unaccounted_bytes,
)
from tests.scheduler.builders import (
    MIB,
    gpu,
    gpu_id,
    model,
    reservation,
    residency,
    snapshot,
    view,
)

A, B = model("a"), model("b")
G0, G1 = gpu_id(0), gpu_id(1)
VIEWS = (view("gpu0", 0), view("gpu1", 1), view("spread", 0, 1))


def test_available_is_free_minus_margin_minus_reservations() -> None:
    booked = [reservation(1, "gpu0", A, [(0, 3000)]), reservation(2, "spread", B, [(0, 500), (1, 700)])]
    facts = snapshot([gpu(0, 10_000), gpu(1, 10_000)], VIEWS, [], booked, policy=Policy(vram_margin_bytes=512 * MIB))
    assert reserved_bytes(facts, G0) == 3500 * MIB
    assert available_bytes(facts, G0) == (10_000 - 512 - 3500) * MIB
    assert available_bytes(facts, G0, besides=LoadId(1)) == (10_000 - 512 - 500) * MIB
    assert available_bytes(facts, G1) == (10_000 - 512 - 700) * MIB


def test_available_is_negative_if_more_is_reserved_than_free() -> None:
    facts = snapshot([gpu(0, 1000)], VIEWS, [], [reservation(1, "gpu0", A, [(0, 3000)])])
    assert available_bytes(facts, G0) == -2000 * MIB


def test_a_lost_or_unknown_gpu_has_nothing_available() -> None:
    lost = replace(gpu(0, 10_000), error="GPU is lost")
    facts = snapshot([lost], VIEWS)
    assert available_bytes(facts, G0) == capacity_bytes(facts, G0) == 0
    assert available_bytes(facts, G1) == capacity_bytes(facts, G1) == external_bytes(facts, G1) == 0


def test_memory_used_by_other_programs_is_external_and_not_capacity() -> None:
    ours = [residency("gpu0", A, 4000), residency("spread", B, 2000, 2000)]
    facts = snapshot([gpu(0, 15_000), gpu(1, 22_000)], VIEWS, ours)
    assert resident_bytes(facts, G0) == 6000 * MIB
    assert external_bytes(facts, G0) == 3000 * MIB
    assert (
        capacity_bytes(facts, G0) == (15_000 + 6300) * MIB
    )  # up to 5 % more than our accounting is attributed to our models
    assert external_bytes(facts, G1) == 0
    assert capacity_bytes(facts, G1) == 24_000 * MIB


def test_memory_that_the_driver_does_not_report_as_used_is_unaccounted() -> None:
    ours = [residency("gpu0", A, 4000), residency("spread", B, 2000, 2000)]
    facts = snapshot([gpu(0, 18_500), gpu(1, 10_000)], VIEWS, ours)
    assert unaccounted_bytes(facts, G0) == 500 * MIB
    assert unaccounted_bytes(facts, G1) == 0
    assert external_bytes(facts, G0) == 0


def test_an_unloading_model_still_holds_its_memory_and_a_loading_one_does_not_yet() -> None:
    states = {state: residency("gpu0", A, 1000, state=state) for state in ResidencyState}
    held = {state for state, found in states.items() if resident_bytes(snapshot([gpu(0, 0)], VIEWS, [found]), G0)}
    assert held == {ResidencyState.READY, ResidencyState.UNLOADING}


def test_the_memory_of_a_running_load_is_not_external() -> None:
    """The driver reports 5,000 of 8,000 reserved MiB as used already."""
    facts = snapshot([gpu(0, 19_000)], VIEWS, [], [reservation(1, "gpu0", A, [(0, 8000)], sent_at=1.0)])
    assert capacity_bytes(facts, G0) == 24_000 * MIB
    assert external_bytes(facts, G0) == 0


@pytest.mark.parametrize(
    ("times", "external"), [({}, 7000), ({"sent_at": 1.0}, 0), ({"sent_at": 1.0, "finished_at": 2.0}, 2000)]
)
def test_used_memory_is_attributed_to_a_load_while_it_runs(times: dict[str, float], external: int) -> None:
    """7,000 MiB are used: by the load of 8,000 once it was sent; when it has ended, its model holds 5,000."""
    ours = [residency("gpu0", A, 5000)] if "finished_at" in times else []
    facts = snapshot([gpu(0, 17_000)], VIEWS, ours, [reservation(1, "gpu0", A, [(0, 8000)], **times)])
    assert external_bytes(facts, G0) == external * MIB


@pytest.mark.parametrize(
    ("finished_at", "read_at", "settled"),
    [(None, 100.0, False), (50.0, 49.0, False), (50.0, 50.0, False), (50.0, 50.1, True)],
)
def test_a_reservation_ends_with_a_reading_that_began_after_the_load(
    finished_at: float | None, read_at: float, settled: bool
) -> None:
    booked = replace(reservation(1, "gpu0", A, [(0, 1)]), finished_at=finished_at)
    assert is_settled(booked, read_at) is settled


SIZES = st.integers(0, 30_000)


@given(SIZES, SIZES, st.lists(SIZES, max_size=4), st.lists(SIZES, max_size=3), SIZES)
def test_capacity_is_never_below_what_is_available_nor_above_the_gpu(
    free: int, used: int, reserved: list[int], resident: list[int], margin: int
) -> None:
    models = [model(f"m{number}") for number in range(len(resident))]
    facts = snapshot(
        [gpu(0, free, free + used)],
        [view(f"i{number}", 0) for number in range(len(resident) + 1)],
        [residency(f"i{number}", of, size) for number, (of, size) in enumerate(zip(models, resident, strict=True))],
        [reservation(number, "i0", A, [(0, size)]) for number, size in enumerate(reserved)],
        policy=Policy(vram_margin_bytes=margin * MIB),
    )
    capacity, available = capacity_bytes(facts, G0), available_bytes(facts, G0)
    assert max(0, available) <= capacity <= max(0, (free + used - margin) * MIB)
    assert external_bytes(facts, G0) <= used * MIB
    assert available == (free - margin - sum(reserved)) * MIB
    assert reserved_bytes(facts, G1) == 0


def _holding(number: int, *processes: GpuProcess) -> Gpu:
    return replace(gpu(number, 10_000), processes=processes)


def test_the_processes_of_a_server_are_those_that_its_port_leads_to() -> None:
    spec = replace(VIEWS[2].spec, url="http://127.0.0.1:11500")
    ours, others = GpuProcess(1, 700, (40_000, 11_500)), GpuProcess(2, 50, (11_434,))
    assert process_bytes([_holding(0, ours, others), _holding(1, ours, ours)], spec) == (700, 1400)
    assert process_bytes([_holding(0, others), _holding(1, GpuProcess(3, 5))], spec) is None
    assert process_bytes([_holding(0, ours, GpuProcess(4, None, (11_500,))), _holding(1)], spec) is None
    assert process_bytes([replace(_holding(0, ours), error="lost"), _holding(1)], spec) is None
    assert process_bytes([_holding(0, ours), None], spec) is None
