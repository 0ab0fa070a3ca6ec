"""A machine without a driver, with a wrong clock and a long reason, for the tests of what the doctor prints."""

from __future__ import annotations

from pathlib import Path

from router.doctor.examination import examine
from router.doctor.facts import DoctorFacts, HostFacts, OllamaFacts, StoreFacts, Unread

_NO_DRIVER = Unread("no driver is installed")

FACTS = DoctorFacts(
    gpus=_NO_DRIVER,
    driver_version=_NO_DRIVER,
    kernel_log=(),
    host=HostFacts(
        memory_total_bytes=1 << 36,
        open_files_max=1024,
        open_files_needed=1280,
        clock_synchronized=False,
        in_container=False,
        nvidia_devices=0,
        closed_devices=(),
        power_supply_watts=None,
    ),
    ollama=OllamaFacts("/usr/bin/ollama", "0.23.0", "`ollama serve` runs " * 12, {}, {}),
    store=StoreFacts(Path("/models") / ("long" * 30), True, True, False, 1 << 40, 1 << 39, 3e9),
    models=_NO_DRIVER,
)
WARNED = examine(FACTS)
