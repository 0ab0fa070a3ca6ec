"""What a release consists of: the changelog's section, the version, and a wheel that works where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

import router
from tests.support.ollama_server import ROOT, free_port
from tests.support.waiting import eventually_sync


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "deploy" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unreleased_entries_get_version_and_date(release: ModuleType) -> None:
    text = (
        "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [0.2.0] - 2026-11-30\n\n- old\n\n"
        "[Unreleased]: https://x.org/compare/v0.2.0...HEAD\n[0.2.0]: https://x.org/compare/v0.1.0...v0.2.0\n"
    )
    assert release.released_changelog(text, "0.3.0", date(2027, 1, 2)) == (
        "# Changelog\n\n## [Unreleased]\n\n## [0.3.0] - 2027-01-02\n\n- new\n\n## [0.2.0] - 2026-11-30\n\n- old\n\n"
        "[Unreleased]: https://x.org/compare/v0.3.0...HEAD\n[0.3.0]: https://x.org/compare/v0.2.0...v0.3.0\n"
        "[0.2.0]: https://x.org/compare/v0.1.0...v0.2.0\n"
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("## [Unreleased]\n\n## [0.2.0] - 2026-11-30\n- old\n", "0.3.0"),
        ("## [Unreleased]\n- new\n\n## [0.2.0] - 2026-11-30\n", "0.2.0"),
        ("## [0.2.0] - 2026-11-30\n", "0.3.0"),
    ],
    ids=["nothing new", "released already", "no section"],
)
def test_a_release_without_news_is_refused(release: ModuleType, text: str, version: str) -> None:
    with pytest.raises(release.ReleaseError):
        release.released_changelog(text, version, date(2027, 1, 2))


@pytest.mark.parametrize("name", ["router/__init__.py", "deploy/helm/llamayard/Chart.yaml"])
def test_every_file_that_states_the_version_is_changed(release: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    changed = release.with_version(text, "9.8.7")
    assert router.__version__ not in changed
    assert text.count(router.__version__) == changed.count("9.8.7")


@pytest.mark.rig
def test_the_wheel_serves_where_it_is_installed(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools leaves its work beside what it builds
    shutil.copytree(ROOT / "router", source / "router", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode and os.environ.get("CI", "").lower() != "true":
        pytest.skip(f"pip cannot build here, perhaps without a network: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    subprocess.run([tmp_path / "venv" / "bin" / "pip", "install", "--quiet", wheel], check=True, timeout=600)
    program = tmp_path / "venv" / "bin" / "llamayard"
    environment = {"HOME": str(tmp_path), "PATH": os.defpath}
    told = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert router.__version__ in told.stdout
    port = free_port()
    with subprocess.Popen(
        [program, "serve", "--rig", "2x3090", "--port", str(port)], env=environment, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as served:  # fmt: skip
        try:
            assert eventually_sync(lambda: _models(port))
        finally:
            served.terminate()


def _models(port: int) -> list[object]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tags", timeout=10) as reply:
            return json.load(reply)["models"]
    except OSError:
        return []
