"""Packs what a bare machine with an NVIDIA GPU needs for `bench.hardware.examine_gpu` into one archive.

`python -m bench.hardware.bundle --ollama .cache/ollama-0.34.0 --out dist/gpu-bundle.tar.xz` packs a real, stripped
Ollama with its llama-server, this tree, wheels of the locked requirements for the named Pythons, the heads of random
models (their gigabytes are written there), and `run.sh`. Nothing is downloaded on that machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bench.hardware.random_model import SHAPES, write_head

_ROOT = Path(__file__).parents[2]
_BYTES_MAX = 60 << 20
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]
_RUN = """#!/bin/sh
# Examines this machine's first GPU in at most ten minutes; writes gpu.json beside this file, or where OUT says.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip install --quiet --no-index --no-deps --find-links wheels --target site -r requirements.txt
PYTHONPATH=site exec "$PYTHON" -m bench.hardware.examine_gpu --bundle . --out "${OUT:-gpu.json}" "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ollama", type=Path, required=True, help="folder with bin/ollama and lib/ollama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pythons", default="3.11,3.12", help="versions to pack wheels for")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "gpu-bundle"
        _add_ollama(folder / "ollama", arguments.ollama)
        _add_wheels(folder, arguments.pythons.split(","))
        for tree in ("router", "bench/hardware"):
            shutil.copytree(_ROOT / tree, folder / tree, ignore=shutil.ignore_patterns("__pycache__", "traces"))
        (folder / "models").mkdir()
        for model, shape in SHAPES.items():
            write_head(folder / "models", model, shape)
        run = folder / "run.sh"
        run.write_text(_RUN, encoding="utf-8")
        run.chmod(0o755)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(arguments.out, "w:xz") as archive:
            archive.add(folder, folder.name)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {size / (1 << 20):.1f} MiB; there: tar xf {arguments.out.name} && gpu-bundle/run.sh")
    if size > _BYTES_MAX:
        sys.exit(f"larger than {_BYTES_MAX >> 20} MiB: pack wheels for fewer Pythons (--pythons 3.12)")


def _add_ollama(target: Path, source: Path) -> None:
    """Copies the server and its engine without symbol tables, and links names that are the same library."""
    shutil.copytree(source, target, symlinks=True)
    seen: dict[bytes, Path] = {}
    for path in sorted((target / "lib").rglob("*"), key=lambda path: (len(path.name), path.name), reverse=True):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if (first := seen.setdefault(content, path)) != path:
            path.unlink()
            path.symlink_to(first.name)
    subprocess.run(["strip", target / "bin" / "ollama"], check=True)


def _add_wheels(folder: Path, pythons: list[str]) -> None:
    """Downloads the locked requirements as wheels. Hashes are checked here; there pip needs only names."""
    lock = _ROOT / "requirements.lock"
    platforms = [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
    for python in pythons:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
        ]
        command += ["--only-binary=:all:", "--python-version", python, *platforms, "--dest", str(folder / "wheels")]
        subprocess.run([*command, "-r", str(lock)], check=True)
    names = [line.split(" ")[0] for line in lock.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
    (folder / "requirements.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
