"""Command lines of the client programs; skips tests whose packages are not installed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.ollama_server import ROOT

PLAYS = Path(__file__).parent / "plays"
_INSTALLED = ROOT / ".cache" / "clients"


def command(play: str, *, light: bool = False) -> list[str]:
    """The command line of a client program. If its packages are missing the test is skipped, or fails if CI=true.

    `light`: needs only packages of the project's own environment.
    """
    path = PLAYS / play
    if light:
        return [sys.executable, str(path)]
    python, node = _INSTALLED / "venv" / "bin" / "python", shutil.which("node")
    if path.suffix == ".py" and python.is_file():
        return [str(python), str(path)]
    if path.suffix == ".mjs" and node and (_INSTALLED / "node" / "node_modules").is_dir():
        return [node, str(_copied_to_packages(path))]
    message = f"{play} needs packages that are not installed: run `make clients`"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)


def _copied_to_packages(path: Path) -> Path:
    """Copies the programs next to the packages, because Node searches packages only in parent folders."""
    folder = _INSTALLED / "node" / "plays"
    folder.mkdir(exist_ok=True)
    for source in PLAYS.glob("*.mjs"):
        shutil.copy(source, folder)
    return folder / path.name
