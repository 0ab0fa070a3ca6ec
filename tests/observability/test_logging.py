"""The form of log lines, as written by a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import sys, structlog
from router.observability.logging import configure_logs
configure_logs(sys.argv[1], "info")
values = {"state": "starting", "reason": "", "version": None, "pid": 0, "ok": False}
structlog.get_logger("router.instance").info("instance_state", **values)
"""


def _line(root: Path, form: str, zone: str = "IST-5:30") -> str:
    command = [sys.executable, "-c", _PROGRAM, form]
    return subprocess.run(command, cwd=root, env={"TZ": zone}, capture_output=True, text=True, check=True).stderr


def test_json_lines_have_times_in_utc_and_no_empty_fields(root: Path) -> None:
    values: dict[str, Any] = json.loads(_line(root, "json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", values.pop("timestamp"))
    assert values == {
        "event": "instance_state",
        "level": "info",
        "logger": "router.instance",
        "state": "starting",
        "pid": 0,
        "ok": False,
    }


@pytest.mark.parametrize(("zone", "offset"), [("IST-5:30", "+05:30"), ("UTC0", "+00:00")])
def test_lines_for_people_have_local_times_with_the_zone_and_no_empty_fields(
    root: Path, zone: str, offset: str
) -> None:
    time, _, rest = _line(root, "human", zone).partition(" ")
    assert time.endswith(offset)
    assert datetime.fromisoformat(time).utcoffset() is not None
    assert "instance_state" in rest
    assert "pid=0" in rest
    assert "reason=" not in rest
    assert "None" not in rest
