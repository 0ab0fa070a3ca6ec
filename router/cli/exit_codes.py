"""Exit codes of the commands. A module of its own, so that `--help` need not import a command."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_MISUSED = 2
EXIT_INTERRUPTED = 130
"""As of a program that SIGINT ended."""
EXIT_BROKEN_PIPE = 141
"""As of a program that SIGPIPE ended."""
