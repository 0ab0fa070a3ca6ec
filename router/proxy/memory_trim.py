"""When the process gives freed memory back to the system, where the C library is glibc; elsewhere nothing happens here.

Left alone, glibc returns the memory of a body when it is freed, so that the next one pays for each of its pages anew,
which costs more than all else that is done to a long body; and it keeps what lies between other blocks for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Of malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD."""
_KEPT_BYTES_MAX: Final = 64 << 20
_REUSED_BYTES_MAX: Final = 16 << 20
"""Larger blocks are returned as soon as they are freed."""


def keep_freed_memory() -> None:
    """Freed memory stays with the process, up to 64 MiB at the end of its heap, until `trimmer` returns it."""
    with contextlib.suppress(AttributeError, OSError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES_MAX)
        set_option(_MMAP_THRESHOLD, _REUSED_BYTES_MAX)


def trimmer() -> Callable[[], object]:
    """Returns a function that takes milliseconds per hundred megabytes; best called in a thread."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return lambda: None
    return lambda: trim(0)
