"""Ollama versions with a reported fault that a router of NVIDIA GPUs meets. Data, with the public issue of each.

An issue is a report, not a proof; each entry says for which versions its reporters saw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Version = tuple[int, int, int]

OLDEST_SERVED: Version = (0, 11, 4)
"""The oldest version that the router is tested with."""


@dataclass(frozen=True, slots=True)
class KnownFault:
    """A fault of the versions from `first` to `last`, both included."""

    first: Version
    last: Version
    what: str
    issue: int
    """Its number at github.com/ollama/ollama/issues."""
    capability_below: tuple[int, int] | None = None
    """Seen only on GPUs of a lower compute capability; None: on any."""
    needs_unequal_gpus: bool = False
    """Seen only where GPUs differ."""

    @property
    def url(self) -> str:
        return f"https://github.com/ollama/ollama/issues/{self.issue}"


KNOWN_FAULTS: tuple[KnownFault, ...] = (
    KnownFault((0, 11, 0), (0, 11, 11), "GPUs of the Pascal generation are not used (no kernel image)", 12341, (7, 0)),
    KnownFault((0, 11, 5), (0, 11, 5), "wrong or no output with OLLAMA_NEW_ESTIMATES=1", 11982),
    KnownFault((0, 12, 5), (0, 12, 5), "models that fitted a GPU before are put partly on the CPU", 12579),
    KnownFault((0, 13, 4), (0, 13, 4), "no GPU is found where 0.12.11 finds it, and models run on the CPU", 13423),
    KnownFault((0, 23, 0), (0, 23, 0), "no GPU is found by some builds, and models run on the CPU", 15968),
    KnownFault(
        (0, 30, 6), (0, 30, 6), "a model is split over unequal GPUs though one has room: a third slower", 16599,
        needs_unequal_gpus=True,
    ),
)  # fmt: skip


def faults_of(
    version: Version, capabilities: tuple[tuple[int, int], ...], *, has_unequal_gpus: bool
) -> Iterator[KnownFault]:
    """The faults of a version on GPUs of these compute capabilities."""
    for fault in KNOWN_FAULTS:
        if not fault.first <= version <= fault.last:
            continue
        if fault.capability_below is not None and not any(each < fault.capability_below for each in capabilities):
            continue
        if fault.needs_unequal_gpus and not has_unequal_gpus:
            continue
        yield fault
