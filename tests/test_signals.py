"""No test depends on how the suite was started: in a terminal, under nohup, or as a background job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SUITE = """
import os, signal, subprocess, sys
from tests.support.signals import default_signals_for_children
default_signals_for_children()
os.kill(os.getpid(), signal.SIGHUP)  # the closed terminal that nohup is for
child = "import signal; print(*[signal.getsignal(number) is not signal.SIG_IGN for number in (1, 2, 15)])"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout, end="")
"""


@pytest.mark.parametrize("ignored", ["HUP", "INT HUP", "HUP INT TERM"])
def test_children_start_with_default_signals_whatever_the_suite_inherited(root: Path, ignored: str) -> None:
    shell = f'trap "" {ignored}; exec "$0" "$@"'
    ended = subprocess.run(
        ["sh", "-c", shell, sys.executable, "-c", _SUITE], cwd=root, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "True True True\n"), ended.stderr
