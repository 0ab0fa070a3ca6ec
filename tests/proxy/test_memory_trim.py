"""What bodies needed is used again, and then returned."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_ROUNDS = """
import io, resource, sys
from router.proxy.memory_trim import keep_freed_memory, trimmer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def bodies():
    all = [io.BytesIO() for _ in range(4)]
    for _ in range(32):
        for each in all:
            each.write(bytes(1 << 18))

if sys.argv[1] == "kept":
    keep_freed_memory()
trim, at_rest = trimmer(), resident()
bodies()
before = faults()
bodies()
print(faults() - before)
trim()
print(resident() - at_rest)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_second_round_of_long_bodies_needs_few_new_pages_and_all_are_returned() -> None:
    def play(how: str) -> list[int]:
        run = subprocess.run([sys.executable, "-c", _ROUNDS, how], stdout=subprocess.PIPE, text=True, check=True)
        return [int(line) for line in run.stdout.split()]

    (usual_faults, _), (kept_faults, left_bytes) = play("usual"), play("kept")
    assert kept_faults < 500 < usual_faults
    assert left_bytes < 4 << 20
