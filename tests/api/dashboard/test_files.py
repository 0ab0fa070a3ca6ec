"""The page's files: what is vendored is what was published, and nothing is inline or comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from fnmatch import fnmatch

from router.api.dashboard.files import STATIC_FILES
from tests.support.tree import ROOT, none_of

VENDORED = json.loads((STATIC_FILES.parent / "vendored.json").read_text(encoding="utf-8"))
OWN = [path for path in STATIC_FILES.iterdir() if not path.name.startswith("vendor-")]


def test_vendored_files_are_unchanged_and_all_are_listed() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in STATIC_FILES.glob("vendor-*")}
    assert found == {entry["file"]: entry["sha256"] for entry in VENDORED}


def test_vendored_libraries_are_named_with_their_licences() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    licences = (STATIC_FILES / "LICENSES.txt").read_text(encoding="utf-8")
    none_of([f"{entry['file']} is not in LICENSES.txt" for entry in VENDORED if entry["file"] not in licences])
    none_of([f"{entry['library']}: {entry['licence']}" for entry in VENDORED
             if not all(entry[key] for key in ("library", "licence", "source"))])  # fmt: skip
    for name in ("uPlot 1.6.32", "htm 3.1.1", "Preact 10"):
        assert name in notice


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = (STATIC_FILES / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<(?:script|style)(?![^>]*\bsrc=)[^>]*>|\bstyle=|\bon\w+=", page) == []
    urls = re.compile(r"""https?://(?!www\.w3\.org/2000/svg)[^\s"'`]+|(?<=["'(])//\w""")
    none_of([f"{path.name}: {url}" for path in OWN if path.suffix != ".txt"
             for url in urls.findall(path.read_text(encoding="utf-8"))])  # fmt: skip


def test_what_the_page_names_is_there() -> None:
    page = (STATIC_FILES / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:src|href)="ui/([^"]+)"', page))
    for path in STATIC_FILES.glob("*.js"):
        named |= set(re.findall(r'^import .* from "\./([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.name for path in STATIC_FILES.iterdir()} - {"index.html", "LICENSES.txt"}


def test_the_wheel_has_every_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["router.api.dashboard"]
    names = ["vendored.json", *(f"static/{path.name}" for path in STATIC_FILES.iterdir())]
    none_of([name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)])
