"""How a play is run, and what becomes of its test where its packages are not installed."""

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
    """The play's command line; skips the test where what it needs is not installed, or fails it where CI=true.

    `light`: it needs only packages of the project's own environment.
    """
    path = PLAYS / play
    if light:
        return [sys.executable, str(path)]
    python, node = _INSTALLED / "venv" / "bin" / "python", shutil.which("node")
    if path.suffix == ".py" and python.is_file():
        return [str(python), str(path)]
    if path.suffix == ".mjs" and node and (_INSTALLED / "node" / "node_modules").is_dir():
        return [node, str(_beside_packages(path))]
    words = f"{play} needs packages that are not installed: run `make clients`"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(words)
    pytest.skip(words)


def _beside_packages(path: Path) -> Path:
    """Node finds packages only above a program, so the plays are copied beside them."""
    folder = _INSTALLED / "node" / "plays"
    folder.mkdir(exist_ok=True)
    for each in PLAYS.glob("*.mjs"):
        shutil.copy(each, folder)
    return folder / path.name
