"""What goes wrong in a run, and when: servers die, GPUs get lost or hot, others take memory, disks are slow.

Clients that hang up are part of the workload (`Turn.ttft_target_seconds`). It only carries faults out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, assert_never

from router.domain.gpu import GpuUuid
from router.lab.simulator.machine import Host


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


class Breakable(Protocol):
    """A contestant, as far as faults concern it."""

    def server_died(self, index: int) -> None:
        """The server of that number dies, counted round the servers there are."""
        ...

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Whatever ran on the GPU is dead."""
        ...


def plan_faults(host: Host, baseline: Breakable, faults: Iterable[Fault]) -> None:
    """Puts all of them on the host's timeline."""
    for fault in faults:
        _plan(host, baseline, fault)


def _plan(host: Host, baseline: Breakable, fault: Fault) -> None:
    begin, end = _steps(host, baseline, fault)

    def begins() -> None:
        host.tally.notes.append((host.timeline.now, f"{fault.kind.value} {fault.target}"))
        begin()

    host.timeline.at(fault.at_seconds, begins)
    if fault.seconds > 0:
        host.timeline.at(fault.at_seconds + fault.seconds, end)


def _steps(host: Host, baseline: Breakable, fault: Fault) -> tuple[Callable[[], None], Callable[[], None]]:
    """What to do when it begins, and when it ends."""
    book = host.book
    gpu = book.gpus[fault.target % len(book.gpus)]
    match fault.kind:
        case FaultKind.DIES:
            return (lambda: baseline.server_died(fault.target)), _nothing
        case FaultKind.LOST:
            return (lambda: _lose(host, baseline, gpu.uuid)), (lambda: book.lost.discard(gpu.uuid))
        case FaultKind.HOT:
            return (lambda: book.slow.update({gpu.uuid: fault.amount})), (lambda: _cool(host, gpu.uuid))
        case FaultKind.EXTERNAL:
            return _taking(host, gpu.uuid, int(gpu.usable_bytes * fault.amount))
        case FaultKind.SLOW_DISK:
            return (lambda: host.lines.set_disk_factor(fault.amount)), (lambda: host.lines.set_disk_factor(1.0))
        case _:
            assert_never(fault.kind)


def _nothing() -> None:
    return None


def _lose(host: Host, baseline: Breakable, uuid: GpuUuid) -> None:
    host.book.lost.add(uuid)
    baseline.gpu_lost(uuid)


def _cool(host: Host, uuid: GpuUuid) -> None:
    host.book.slow.pop(uuid, None)


def _taking(host: Host, uuid: GpuUuid, size_bytes: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Another program takes so much of a GPU, but no more than is free there: its allocation would fail."""
    taken_bytes = 0

    def begin() -> None:
        nonlocal taken_bytes
        taken_bytes = min(size_bytes, host.book.free_bytes(uuid))
        host.book.external_bytes[uuid] += taken_bytes

    def end() -> None:
        host.book.external_bytes[uuid] -= taken_bytes

    return begin, end
