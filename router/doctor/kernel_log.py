"""Reads NVIDIA's error reports (XIDs) out of lines of the kernel log. Pure.

Source of the meanings: NVIDIA, "XID Errors" (docs.nvidia.com/deploy/xid-errors), of release 570.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """What one number means. `is_hardware`: the GPU, its power or its slot, not a program."""

    text: str
    is_hardware: bool = True


XIDS: Mapping[int, XidMeaning] = {
    13: XidMeaning("a program's error on the GPU", is_hardware=False),
    31: XidMeaning("a program's invalid access to GPU memory", is_hardware=False),
    43: XidMeaning("a program's error stopped its channel", is_hardware=False),
    45: XidMeaning("a program was ended while the GPU worked for it", is_hardware=False),
    48: XidMeaning("double-bit memory error"),
    61: XidMeaning("the GPU's own controller stopped"),
    62: XidMeaning("the GPU's own controller stopped"),
    63: XidMeaning("a memory row is replaced: reboot to finish it"),
    64: XidMeaning("a memory row could not be replaced"),
    74: XidMeaning("NVLink error"),
    79: XidMeaning("the GPU has fallen off the bus: power, heat, riser or slot"),
    92: XidMeaning("many corrected memory errors"),
    94: XidMeaning("contained memory error"),
    95: XidMeaning("uncontained memory error"),
    119: XidMeaning("the GPU's system processor does not answer: newer driver, or power"),
    120: XidMeaning("the GPU's system processor failed: newer driver, or power"),
}


@dataclass(frozen=True, slots=True)
class Xid:
    """How often a device reported a number."""

    device: str
    """Its PCI address."""
    number: int
    count: int

    @property
    def is_hardware(self) -> bool:
        """An unknown number counts as one."""
        return self.number not in XIDS or XIDS[self.number].is_hardware

    @property
    def text(self) -> str:
        meaning = XIDS[self.number].text if self.number in XIDS else "not in the table: see NVIDIA's list of XIDs"
        times = "" if self.count == 1 else f", {self.count} times"
        return f"GPU at {self.device}: XID {self.number}{times}: {meaning}"


def xids(lines: Iterable[str]) -> tuple[Xid, ...]:
    """The XIDs in these lines by device and number."""
    counts: dict[tuple[str, int], int] = {}
    for line in lines:
        match = _XID.search(line)
        if match is not None:
            key = match[1], int(match[2])
            counts[key] = counts.get(key, 0) + 1
    return tuple(Xid(device, number, count) for (device, number), count in sorted(counts.items()))
