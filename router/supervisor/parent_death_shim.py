"""Executes a program that receives a signal when the router dies.

Run by path: `python -I -S parent_death_shim.py SIGNAL PARENT_PID PROGRAM ARGUMENT...`. Asks the kernel to send SIGNAL
when the parent dies (prctl(2), PR_SET_PDEATHSIG), then replaces itself with PROGRAM, so the router's child process is
the server itself. This runs in a new interpreter rather than in `preexec_fn`, because running Python between fork and
exec is unsafe in a threaded program.

Uses only the standard library, without site-packages, so that it starts in about 15 ms.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
EXIT_NOT_EXECUTED = 127
"""The program could not be executed; the last line of output says why."""
EXIT_PARENT_GONE = 126
"""The parent died before the program was executed."""


def main(arguments: list[str]) -> int:
    signal_number, parent_pid, program = int(arguments[0]), int(arguments[1]), arguments[2]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            sys.stderr.write(f"cannot set the parent-death signal: {os.strerror(ctypes.get_errno())}\n")
    if os.getppid() != parent_pid:  # it died before prctl, so the kernel will not send the signal
        return EXIT_PARENT_GONE
    try:
        os.execvp(program, arguments[2:])
    except OSError as error:
        sys.stderr.write(f"cannot execute {program}: {error.strerror}\n")
        return EXIT_NOT_EXECUTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
