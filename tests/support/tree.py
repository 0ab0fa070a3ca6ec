"""The project's source files, for the checks of the code's structure."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    path: Path

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def name(self) -> str:
        return self.where.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def layer(self) -> str:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> tuple[tuple[str, int], ...]:
        """Imported modules with their lines; `from router.domain import ids` counts as `router.domain.ids`."""
        return tuple(_imports(self.tree))

    @cached_property
    def identifiers(self) -> tuple[tuple[str, int], ...]:
        """Every name that the module binds, reads or passes, with its line."""
        return tuple(_identifiers(self.tree))


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias(name=name, asname=alias):
                yield alias or name, node.lineno
            case _:
                pass


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                is_module = base.startswith("router") and _file_of(f"{base}.{alias.name}").is_file()
                yield (f"{base}.{alias.name}" if is_module else base), node.lineno


def _file_of(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


MODULES = tuple(Module(path) for path in sorted((ROOT / "router").rglob("*.py")))
TESTS = tuple(Module(path) for path in sorted((ROOT / "tests").rglob("*.py")))


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every tracked or untracked, not ignored text file, with its content."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
        hidden = (".venv", ".cache", ".git", ".hypothesis", ".pytest_cache", ".ruff_cache")
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [
            path.as_posix()
            for path in found
            if not path.parts[0].startswith(hidden) and "__pycache__" not in path.parts
        ]
    for name in names:
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            yield name, data.decode("utf-8", errors="replace")


def none_of(offences: list[str]) -> None:
    assert not offences, "\n  ".join(["", *offences])
