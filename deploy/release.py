"""Makes a release: `python deploy/release.py 0.3.0`, or `make release VERSION=0.3.0`.

Moves the *Unreleased* entries of CHANGELOG.md under the version, sets the version of the program and of the chart,
commits, tags, and builds sdist, wheel, software bill of materials (CycloneDX) and checksums in dist/. Nothing is pushed
or uploaded: the last line says how.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import venv
from datetime import UTC, date, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TOOLS = ("build>=1.2,<2", "twine>=6,<7", "cyclonedx-bom>=7,<8")
_UNRELEASED = "## [Unreleased]"


class ReleaseError(Exception):
    """It cannot be released; the text says why."""


def released_changelog(text: str, version: str, day: date) -> str:
    """The changelog with its unreleased entries under `version`, and an empty section above.

    Raises:
        ReleaseError: there are no entries, or the version is there already.
    """
    if f"## [{version}]" in text:
        raise ReleaseError(f"CHANGELOG.md has a section for {version} already")
    before, found, after = text.partition(_UNRELEASED + "\n")
    if not found or not re.split(r"^## \[", after, maxsplit=1, flags=re.MULTILINE)[0].strip():
        raise ReleaseError("CHANGELOG.md: nothing is unreleased")
    link = re.compile(r"^\[Unreleased\]: (\S+/compare)/v(\S+)\.\.\.HEAD$", re.MULTILINE)
    after = link.sub(rf"[Unreleased]: \1/v{version}...HEAD\n[{version}]: \1/v\2...v{version}", after)
    return f"{before}{_UNRELEASED}\n\n## [{version}] - {day:%Y-%m-%d}\n{after}"


def with_version(text: str, version: str) -> str:
    """A file with each version that it states set: `__version__`, or a chart's `version` and `appVersion`."""
    changed, count = re.subn(
        r'^(__version__ = "|version: |appVersion: )[0-9][^"\n]*', rf"\g<1>{version}", text, flags=re.MULTILINE
    )
    if not count:
        raise ReleaseError("a file states no version")
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="such as 0.3.0")
    version = parser.parse_args().version
    try:
        _check(version)
        _write(version)
        _git("commit", "--quiet", "--all", "--message", f"build: release {version}")
        _git("tag", "--annotate", f"v{version}", "--message", f"llamayard {version}")
        files = _build(ROOT / "dist")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(file.relative_to(ROOT)) for file in files))
    print(
        f"to publish: git push && git push origin v{version}; .cache/release/bin/twine upload dist/*.whl dist/*.tar.gz"
    )
    return 0


def _check(version: str) -> None:
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise ReleaseError(f"{version}: write a version such as 0.3.0 or 0.3.0rc1")
    if _git("status", "--porcelain"):
        raise ReleaseError("the tree has changes that are not committed")
    if _git("tag", "--list", f"v{version}"):
        raise ReleaseError(f"the tag v{version} is there already")


def _write(version: str) -> None:
    changelog = ROOT / "CHANGELOG.md"
    text = released_changelog(changelog.read_text(encoding="utf-8"), version, datetime.now(UTC).date())
    changelog.write_text(text, encoding="utf-8")
    for name in ("router/__init__.py", "deploy/helm/llamayard/Chart.yaml"):
        path = ROOT / name
        path.write_text(with_version(path.read_text(encoding="utf-8"), version), encoding="utf-8")


def _build(target: Path) -> list[Path]:
    tools = ROOT / ".cache" / "release"
    if not (tools / "bin" / "twine").is_file():
        venv.create(tools, with_pip=True)
        _run(str(tools / "bin" / "pip"), "install", "--quiet", *_TOOLS)
    python = str(tools / "bin" / "python")
    for old in target.glob("llamayard-*"):
        old.unlink()
    _run(python, "-m", "build", "--outdir", str(target), str(ROOT))
    _run(str(tools / "bin" / "cyclonedx-py"), "requirements", "requirements.lock", "--output-reproducible",
         "--pyproject", "pyproject.toml", "--output-file", str(target / "llamayard-sbom.cdx.json"))  # fmt: skip
    packages = [file for pattern in ("*.whl", "*.tar.gz") for file in target.glob("llamayard-" + pattern)]
    _run(str(tools / "bin" / "twine"), "check", "--strict", *map(str, packages))
    files = [*packages, target / "llamayard-sbom.cdx.json"]
    sums = target / "llamayard-sha256sums.txt"
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    sums.write_text("".join(lines), encoding="utf-8")
    return [*files, sums]


def _git(*arguments: str) -> str:
    return _run("git", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
