"""Parses the GPUs that a server reports in its `inference compute` log lines.

A server that cannot see its GPU falls back to the CPU silently; before the first load these lines are the only sign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from router.domain.gpu import GpuUuid

_LINE = re.compile(r'msg="inference compute" (?P<fields>.*)')
_FIELD = re.compile(r'(?P<key>\w+)=(?P<value>"(?:[^"\\]|\\.)*"|\S*)')
_UUID_PREFIXES = ("GPU-", "MIG-")


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """One device as a server reports it."""

    id: str
    """A UUID up to 0.24; from 0.30, which asks `llama-server` for its devices, a bare number."""
    library: str
    """`cpu`, `CUDA` (`cuda` in older versions), `ROCm`, `Vulkan`."""

    @property
    def is_cpu(self) -> bool:
        return self.library.lower() == "cpu"


def parse_compute_line(line: str) -> ComputeDevice | None:
    """The device of an `inference compute` line; None for any other line."""
    match = _LINE.search(line)
    if match is None:
        return None
    fields = {found["key"]: found["value"].strip('"') for found in _FIELD.finditer(match["fields"])}
    return ComputeDevice(fields.get("id", ""), fields.get("library", ""))


def missing_gpus(expected: Sequence[GpuUuid], reported: Sequence[ComputeDevice]) -> tuple[GpuUuid, ...]:
    """The expected GPUs that were not reported. If a server only numbers its devices, they are counted."""
    gpus = [device for device in reported if not device.is_cpu]
    ids = {device.id.lower() for device in gpus}
    if any(uuid.startswith("MIG-") for uuid in expected) or not any(d.id.startswith(_UUID_PREFIXES) for d in gpus):
        return tuple(expected[len(gpus) :])  # CUDA reports a MIG device under its GPU's UUID on some drivers
    return tuple(uuid for uuid in expected if uuid.lower() not in ids)


def unexpected_devices(expected: Sequence[GpuUuid], reported: Sequence[ComputeDevice]) -> tuple[ComputeDevice, ...]:
    """GPUs that a server reports in addition to those that it was given, whose memory it would use unaccounted."""
    return tuple(device for device in reported if not device.is_cpu)[len(expected) :]


def gpus_problem(expected: Sequence[GpuUuid], reported: Sequence[ComputeDevice]) -> str | None:
    """Message about GPUs that the server does not see; None if it reports all of them."""
    missing = missing_gpus(expected, reported)
    if not missing:
        return None
    devices = ", ".join(f"{device.id} ({device.library})" for device in reported) or "no device yet"
    return f"does not see its GPUs {', '.join(missing)}: it reports {devices}"


class ComputeReport:
    """The devices that one run of a server has reported. Satisfies `GpuReport`; the protocol documents the methods."""

    def __init__(self, expected: Sequence[GpuUuid]) -> None:
        self._expected = expected
        self._devices: list[ComputeDevice] = []

    def read_line(self, line: str) -> bool:
        device = parse_compute_line(line)
        if device is None:
            return False
        self._devices.append(device)
        return True

    @property
    def problem(self) -> str | None:
        return gpus_problem(self._expected, self._devices)

    @property
    def is_final(self) -> bool:
        """True once the server reported the CPU, which it does only without a usable GPU."""
        return any(device.is_cpu for device in self._devices)

    @property
    def has_devices(self) -> bool:
        return bool(self._devices)

    @property
    def unexpected(self) -> tuple[str, ...]:
        return tuple(f"{device.id} ({device.library})" for device in unexpected_devices(self._expected, self._devices))
