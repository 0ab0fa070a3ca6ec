"""What `llamayard doctor` reads of an EMULATED machine besides its GPUs: the key `host` of a rig file.

The defaults are a machine in good order, whatever machine the emulator runs on. Starts and reads nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class EmulatedHost:
    """Facts of the emulated machine. None: they cannot be read there."""

    driver_version: str | None = "570.133.20"
    kernel_log: tuple[str, ...] | None = ()
    """Lines, without times."""
    power_supply_watts: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the shell that starts the router."""
    service_environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """`Environment=` of the stock service's unit."""
    stock_service: str = ""
    """What runs a stock Ollama, such as `ollama.service is active`; "": nothing."""
    ollama_version: str | None = None
    """Of the installed Ollama; None: the version of the emulated servers."""
    has_ollama: bool = True
    has_visible_gpus: bool = True
    """Whether the driver can be asked, as in a container that was given its GPUs."""
    in_container: bool = False
    nvidia_devices: int | None = None
    """NVIDIA GPUs on the PCI bus; None: as many as the rig has."""
    closed_devices: tuple[str, ...] = ()
    """Device files that this user may not open."""
    store_readable: bool = True
    store_writable: bool = True
    store_total_bytes: int = 2000 * GIB
    store_free_bytes: int = 1000 * GIB
    store_bytes_per_second: float | None = 3e9
    memory_total_bytes: int | None = None
    """None: the rig's `ram_bytes`."""
    open_files_max: int = 524_288
    clock_synchronized: bool | None = True
    port_holder: str = ""
    """What listens on the router's port; "": nothing, or a router."""


HOST_KEYS = tuple(each.name for each in dataclasses.fields(EmulatedHost))


def read_host(data: Mapping[str, Any]) -> EmulatedHost:
    """Reads the key `host`; lists become tuples.

    Raises:
        KeyError: an unknown key.
        TypeError: a value of another type than the default's.
    """
    values: dict[str, Any] = {}
    defaults = EmulatedHost()
    for key, value in data.items():
        if key not in HOST_KEYS:
            raise KeyError(key)
        if isinstance(value, list):
            value = tuple(str(item) for item in cast("Iterable[object]", value))
        default = getattr(defaults, key)
        if value is not None and default is not None and not _is_alike(value, default):
            raise TypeError(f"host: {key}: {value!r} is no {type(default).__name__}")
        values[key] = value
    return EmulatedHost(**values)


def _is_alike(value: object, default: object) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, type(default))
