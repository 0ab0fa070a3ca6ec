"""Fault injection: crashed servers, failing unloads, lost or throttled GPUs, external VRAM use, slow disks, drains.

Clients that hang up are part of the workload instead (`Turn.hang_up_after_seconds`).
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
    """The `target`-th server crashes; the baseline restarts it in its own way."""
    LOST = "lost"
    """The `target`-th GPU is lost for `seconds`."""
    HOT = "hot"
    """The `target`-th GPU is throttled: it takes `amount` times as long for `seconds`."""
    EXTERNAL = "foreign"
    """Another program allocates a share `amount` of the `target`-th GPU's memory, if free, for `seconds`."""
    STUCK = "unloads fail"
    """The `target`-th server fails every unload for `seconds`; the baselines' servers unload by themselves."""
    DRAINED = "drained"
    """An operator drains the `target`-th GPU for `seconds`. Only the router knows drains."""
    RESTART = "restart"
    """An operator requests a restart of all instances, one after the other. Only the router knows it."""
    SLOW_DISK = "slow disk"
    """The disk reads at `amount` times its normal rate for `seconds`."""


@dataclass(frozen=True, slots=True)
class Fault:
    at_seconds: float
    kind: FaultKind
    target: int = 0
    amount: float = 1.0
    seconds: float = 0.0


class FaultTarget(Protocol):
    """The part of a baseline that faults act on."""

    def server_died(self, index: int) -> None:
        """Crashes one server; `index` is taken modulo the number of servers."""
        ...

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Makes the unloads of one server fail, or succeed again; `index` as in `server_died`."""
        ...

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Ends everything that runs on this GPU."""
        ...

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """Takes a GPU out of service, or brings it back."""
        ...

    def restart_all(self) -> None:
        """Restarts all servers, one after the other."""
        ...


def schedule_faults(machine: Machine, baseline: FaultTarget, faults: Iterable[Fault]) -> None:
    """Schedules all faults on the machine's timeline."""
    for fault in faults:
        _schedule(machine, baseline, fault)


def _schedule(machine: Machine, baseline: FaultTarget, fault: Fault) -> None:
    begin, end = _callbacks(machine, baseline, fault)

    def start() -> None:
        machine.stats.notes.append((machine.timeline.now, f"{fault.kind.value} {fault.target}"))
        begin()

    machine.timeline.at(fault.at_seconds, start)
    if fault.seconds > 0:
        machine.timeline.at(fault.at_seconds + fault.seconds, end)


def _callbacks(machine: Machine, baseline: FaultTarget, fault: Fault) -> tuple[Callable[[], None], Callable[[], None]]:
    """The callbacks at the start and at the end of the fault."""
    ledger = machine.ledger
    gpu = ledger.gpus[fault.target % len(ledger.gpus)]
    match fault.kind:
        case FaultKind.DIES:
            return (lambda: baseline.server_died(fault.target)), _do_nothing
        case FaultKind.LOST:
            return (lambda: _lose_gpu(machine, baseline, gpu.uuid)), (lambda: ledger.lost.discard(gpu.uuid))
        case FaultKind.HOT:
            return (lambda: ledger.slowdown_by_gpu.update({gpu.uuid: fault.amount})), (
                lambda: _end_throttling(machine, gpu.uuid)
            )
        case FaultKind.EXTERNAL:
            return _external_allocation(machine, gpu.uuid, int(gpu.usable_bytes * fault.amount))
        case FaultKind.STUCK:
            return (lambda: baseline.unloads_fail(fault.target, is_failing=True)), (
                lambda: baseline.unloads_fail(fault.target, is_failing=False)
            )
        case FaultKind.DRAINED:
            return (lambda: baseline.drain(gpu.uuid, is_resumed=False)), (
                lambda: baseline.drain(gpu.uuid, is_resumed=True)
            )
        case FaultKind.RESTART:
            return baseline.restart_all, _do_nothing
        case FaultKind.SLOW_DISK:
            return (lambda: machine.transfers.set_disk_factor(fault.amount)), (
                lambda: machine.transfers.set_disk_factor(1.0)
            )
        case _:
            assert_never(fault.kind)


def _do_nothing() -> None:
    return None


def _lose_gpu(machine: Machine, baseline: FaultTarget, uuid: GpuUuid) -> None:
    machine.ledger.lost.add(uuid)
    baseline.gpu_lost(uuid)


def _end_throttling(machine: Machine, uuid: GpuUuid) -> None:
    machine.ledger.slowdown_by_gpu.pop(uuid, None)


def _external_allocation(
    machine: Machine, uuid: GpuUuid, size_bytes: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """An external allocation, limited to what is free at its start."""
    allocated_bytes = 0

    def begin() -> None:
        nonlocal allocated_bytes
        allocated_bytes = min(size_bytes, machine.ledger.free_bytes(uuid))
        machine.ledger.external_bytes[uuid] += allocated_bytes

    def end() -> None:
        machine.ledger.external_bytes[uuid] -= allocated_bytes

    return begin, end
