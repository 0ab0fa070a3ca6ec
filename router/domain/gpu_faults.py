"""What GPUs report when they fail: XID errors by class, and temperatures. Data.

XIDs are NVIDIA's numbers for errors that the driver logs. Source: NVIDIA, "XID Errors", the catalog of XIDs
(docs.nvidia.com/deploy/xid-errors). Only those are listed that concern a machine that serves models; any other XID is
logged and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Xid:
    """One XID; `is_of_gpu`: the GPU cannot be trusted, not only the program that met it."""

    meaning: str
    is_of_gpu: bool


XIDS: Mapping[int, Xid] = MappingProxyType(
    {
        13: Xid("graphics engine exception, mostly a program's error", False),
        31: Xid("GPU memory page fault, mostly a program's error", False),
        43: Xid("GPU stopped processing, mostly a program's error", False),
        45: Xid("preemptive cleanup after another error or an ended program", False),
        48: Xid("double bit ECC error", True),
        62: Xid("internal micro-controller halt", True),
        63: Xid("ECC page retirement or row remapping recorded", True),
        64: Xid("ECC page retirement or row remapping failed", True),
        74: Xid("NVLink error", True),
        79: Xid("GPU has fallen off the bus", True),
        94: Xid("contained ECC error", True),
        95: Xid("uncontained ECC error", True),
        119: Xid("GSP remote procedure call timed out", True),
        120: Xid("GSP error", True),
    }
)

HOT_CELSIUS = 85
"""From here on other GPUs are preferred for new loads and requests: GPUs throttle at 83 to 95 °C."""
COOL_CELSIUS = 80
"""Below this a GPU is no longer hot: the difference avoids a change with every reading."""
OVERHEATED_CELSIUS = 90
OVERHEATED_SECONDS = 30.0
"""So long at `OVERHEATED_CELSIUS` or above drains a GPU."""

SLOWING_REASONS = frozenset({"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
"""Reasons for lower clocks that mean trouble: heat, or a power supply that asks the GPU to brake."""


def describe_xid(code: int) -> str:
    """`XID 79 (GPU has fallen off the bus)`."""
    known = XIDS.get(code)
    return f"XID {code}" + (f" ({known.meaning})" if known is not None else "")
