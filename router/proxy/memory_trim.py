"""Returns free memory to the system: otherwise glibc keeps what large bodies once needed.

Does nothing where the C library has no `malloc_trim`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def trimmer() -> Callable[[], object]:
    """Returns a function that takes milliseconds per hundred megabytes; best called in a thread."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return lambda: None
    return lambda: trim(0)
