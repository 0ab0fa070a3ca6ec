"""The rules of the tree that no tool checks: sizes, names, cycles, dead modules, nothing of one machine.

Layers and the homes of libraries are contracts of import-linter, banned calls and imports inside functions are ruff's,
unused code is vulture's; all are in pyproject.toml. Each check lists every offender, so that one run shows them all.
"""

from __future__ import annotations

import ast
import re

from tests.support.tree import MODULES, TESTS, none_of, tracked_texts

MODULE_LINES = 700
FUNCTION_LINES = 70

CORE_LIBRARIES = frozenset(
    ("__future__", "abc", "bisect", "collections", "dataclasses", "enum", "fractions", "functools", "heapq",
     "itertools", "math", "operator", "re", "types", "typing")
)  # fmt: skip
"""Standard modules without clock, socket, environment, file or random source."""

ENTRY_POINTS = frozenset(
    {
        "router.__main__",
        "router.cli.main",
        "router.cli.plan",
        "router.tools.generate_docs",
        "router.tools.generate_footprint_table",
        "router.lab.emulator.runner",
        "router.lab.emulator.server",
        "router.lab.simulator.chaos",
        "router.lab.plot",
    }
)
"""Modules that are started by name, so that no other module need import them."""


def test_deciding_uses_nothing_that_has_a_clock_a_socket_or_a_file() -> None:
    pure = [m for m in MODULES if m.layer in ("domain", "scheduler")]
    none_of([f"{m.where}:{line} imports {name}" for m in pure for name, line in m.imports
             if name.split(".")[0] not in CORE_LIBRARIES | {"router"}])  # fmt: skip


def test_there_is_no_import_cycle() -> None:
    graph = {m.name: {name for name, _ in m.imports if name.startswith("router.")} - {m.name} for m in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_modules_and_functions_stay_small() -> None:
    offences: list[str] = []
    for module in (*MODULES, *TESTS):
        lines = len(module.text.splitlines())
        if lines > MODULE_LINES:
            offences.append(f"{module.where}: {lines} lines, over {MODULE_LINES}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    offences.append(f"{module.where}:{node.lineno} {node.name}: {length} lines, over {FUNCTION_LINES}")
    none_of(offences)


BANNED_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "manager", "stuff", "singleton"})


def test_no_module_is_named_for_nothing() -> None:
    none_of([m.where for m in MODULES if m.path.stem in BANNED_NAMES])


ENVIRONMENT_READERS = frozenset({"router/config/inputs.py", "router/lab/emulator/server.py"})
"""One for each program: the router and the emulated server."""


def test_only_the_edge_of_a_program_is_exempt_from_banned_calls() -> None:
    none_of([m.where for m in MODULES if "noqa: TID251" in m.text and m.where not in ENVIRONMENT_READERS])


WAITING = "tests/support/waiting.py"


def test_tests_patch_nothing_and_do_not_sleep() -> None:
    offences: list[str] = []
    for module in TESTS:
        patches = [(name, line) for name, line in module.imports if name.startswith("unittest.mock")]
        offences += [f"{module.where}:{line} imports {name}" for name, line in patches]
        for node in ast.walk(module.tree):
            is_patch = isinstance(node, ast.arg) and node.arg in ("monkeypatch", "mocker")
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            pauses = name == "time.sleep" or (name == "asyncio.sleep" and ast.unparse(node) != "asyncio.sleep(0)")
            if isinstance(node, ast.arg | ast.Call) and (is_patch or (pauses and module.where != WAITING)):
                offences.append(f"{module.where}:{node.lineno} {ast.unparse(node)}")
    none_of(offences)


def test_no_module_is_dead() -> None:
    used = {name for m in MODULES for name, _ in m.imports} | ENTRY_POINTS
    none_of([m.where for m in MODULES if m.name not in used and m.path.name != "__init__.py"])


def test_every_helper_of_the_tests_is_used() -> None:
    used = {name for m in TESTS for name, _ in m.imports} | {
        f"tests.support.{part}" for m in TESTS for part in re.findall(r"from tests\.support import (\w+)", m.text)
    }
    none_of([m.where for m in TESTS if m.where.startswith("tests/support/") and m.path.stem != "__init__"
             and m.name not in used])  # fmt: skip


OLD_WORDS = frozenset(
    ("asker", "askers", "card", "cards", "contestant", "contestants", "desk", "glance", "glances", "outlook", "peek",
     "peeks", "shortway", "site", "sites", "veto", "waking")
)  # fmt: skip
"""House words that gave way to the field's: GPU, replica, candidate, context, parse, client identity, baseline."""

OLD_MODULES = OLD_WORDS | frozenset(
    ("books", "calm", "choosing", "core", "fleet", "gateway", "homes", "known", "looks", "moving", "parties",
     "patience", "pauses", "plans", "reduced", "relay", "rig", "sim", "sizing", "splitting", "standing", "sums",
     "usual", "words")
)  # fmt: skip
"""Names that modules and folders had before they took their field's term."""

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def test_old_words_do_not_come_back_in_identifiers() -> None:
    none_of([f"{m.where}:{line} {name}" for m in MODULES for name, line in m.identifiers
             if OLD_WORDS & {word.lower() for word in WORD.findall(name)}])  # fmt: skip


def test_modules_carry_the_terms_of_their_field() -> None:
    none_of([m.where for m in MODULES if OLD_MODULES & set(m.name.split(".")[1:])])


PRIVATE = re.compile("|".join((r"/(?:work|farm|root)/[\w.]", r"\bfiles\.pythonhosted" + r"\.org", r"--index-url")))


def test_no_file_names_one_machine_or_registry() -> None:
    own = "tests/test_tidy.py"
    none_of([f"{name}:{at}: {line.strip()[:120]}" for name, text in tracked_texts() if name != own
             for at, line in enumerate(text.splitlines(), 1) if PRIVATE.search(line)])  # fmt: skip
