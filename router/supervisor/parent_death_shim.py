"""Becomes the program that it is given, once that program is sure to be told when the router dies.

Run by path: `python -I -S shim.py SIGNAL PARENT_PID PROGRAM ARGUMENT…`. Asks the kernel for SIGNAL at the death of the
parent and executes PROGRAM in its own place, so the process that the router started *is* the server. Done here and not
between fork and exec of the router itself, which would run Python in a forked copy of a threaded program.

Uses the standard library only, without site-packages, to start in some 15 ms.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
EXIT_NOT_EXECUTED = 127
"""The program could not be executed; the reason is the last line of output."""
EXIT_PARENT_GONE = 126


def main(arguments: list[str]) -> int:
    number, parent, program = int(arguments[0]), int(arguments[1]), arguments[2]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            sys.stderr.write(f"no parent-death signal: {os.strerror(ctypes.get_errno())}\n")
    if os.getppid() != parent:  # died before the request reached the kernel, which then never signals
        return EXIT_PARENT_GONE
    try:
        os.execvp(program, arguments[2:])
    except OSError as error:
        sys.stderr.write(f"cannot execute {program}: {error.strerror}\n")
        return EXIT_NOT_EXECUTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
