"""Gives memory that is free back to the system: glibc keeps what large bodies needed once, for as long as it runs.

Nothing but that; where the C library has no such call it does nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def trimmer() -> Callable[[], object]:
    """What gives it back: milliseconds of work for each hundred megabytes, best done in a thread."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return lambda: None
    return lambda: trim(0)
