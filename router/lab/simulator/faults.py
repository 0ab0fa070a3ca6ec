"""What goes wrong in a run, and when: servers die, GPUs get lost or hot, others take memory, disks are slow.

Clients that hang up are part of the workload (`Turn.ttft_target_seconds`). It only carries faults out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, assert_never

from router.domain.gpu import GpuUuid
from router.lab.simulator.machine import Machine


class FaultKind(StrEnum):
    DIES = "dies"
    """The `target`-th server dies; it is started again as its contestant does that."""
    LOST = "lost"
    """The `target`-th GPU is lost for `seconds`."""
    HOT = "hot"
    """The `target`-th GPU computes `amount` times slower for `seconds`."""
    EXTERNAL = "foreign"
    """Another program takes `amount` of the `target`-th GPU's memory, as a share, or what is free, for `seconds`."""
    SLOW_DISK = "slow disk"
    """The disk gives `amount` of its rate for `seconds`."""


@dataclass(frozen=True, slots=True)
class Fault:
    at_seconds: float
    kind: FaultKind
    target: int = 0
    amount: float = 1.0
    seconds: float = 0.0


class FaultTarget(Protocol):
    """A contestant, as far as faults concern it."""

    def server_died(self, index: int) -> None:
        """The server of that number dies, counted round the servers there are."""
        ...

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Whatever ran on the GPU is dead."""
        ...


def schedule_faults(machine: Machine, baseline: FaultTarget, faults: Iterable[Fault]) -> None:
    """Puts all of them on the host's timeline."""
    for fault in faults:
        _plan(machine, baseline, fault)


def _plan(machine: Machine, baseline: FaultTarget, fault: Fault) -> None:
    begin, end = _steps(machine, baseline, fault)

    def begins() -> None:
        machine.stats.notes.append((machine.timeline.now, f"{fault.kind.value} {fault.target}"))
        begin()

    machine.timeline.at(fault.at_seconds, begins)
    if fault.seconds > 0:
        machine.timeline.at(fault.at_seconds + fault.seconds, end)


def _steps(machine: Machine, baseline: FaultTarget, fault: Fault) -> tuple[Callable[[], None], Callable[[], None]]:
    """What to do when it begins, and when it ends."""
    ledger = machine.ledger
    gpu = ledger.gpus[fault.target % len(ledger.gpus)]
    match fault.kind:
        case FaultKind.DIES:
            return (lambda: baseline.server_died(fault.target)), _nothing
        case FaultKind.LOST:
            return (lambda: _lose(machine, baseline, gpu.uuid)), (lambda: ledger.lost.discard(gpu.uuid))
        case FaultKind.HOT:
            return (lambda: ledger.slowdown_by_gpu.update({gpu.uuid: fault.amount})), (lambda: _cool(machine, gpu.uuid))
        case FaultKind.EXTERNAL:
            return _taking(machine, gpu.uuid, int(gpu.usable_bytes * fault.amount))
        case FaultKind.SLOW_DISK:
            return (lambda: machine.transfers.set_disk_factor(fault.amount)), (
                lambda: machine.transfers.set_disk_factor(1.0)
            )
        case _:
            assert_never(fault.kind)


def _nothing() -> None:
    return None


def _lose(machine: Machine, baseline: FaultTarget, uuid: GpuUuid) -> None:
    machine.ledger.lost.add(uuid)
    baseline.gpu_lost(uuid)


def _cool(machine: Machine, uuid: GpuUuid) -> None:
    machine.ledger.slowdown_by_gpu.pop(uuid, None)


def _taking(machine: Machine, uuid: GpuUuid, size_bytes: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Another program takes so much of a GPU, but no more than is free there: its allocation would fail."""
    taken_bytes = 0

    def begin() -> None:
        nonlocal taken_bytes
        taken_bytes = min(size_bytes, machine.ledger.free_bytes(uuid))
        machine.ledger.external_bytes[uuid] += taken_bytes

    def end() -> None:
        machine.ledger.external_bytes[uuid] -= taken_bytes

    return begin, end
