"""The rules that keep the tree readable, checked: layers, sizes, banned names, dead modules, nothing of one machine.

Each check lists every offender at once, so that one run shows all there is to mend.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from tests.support.tree import MODULES, TESTS, layer_of, none_of, tracked_texts

MODULE_LINES = 700
FUNCTION_LINES = 70

_BELOW_SERVING = frozenset(
    {"domain", "scheduler", "control", "engines", "errors", "llm_api", "admission", "http1", "observability"}
)
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "domain": frozenset(),
    "errors": frozenset(),
    "http1": frozenset({"errors", "llm_api"}),
    "scheduler": frozenset({"domain", "engines"}),
    "engines": frozenset({"domain", "scheduler", "errors", "api"}),
    "gpu": frozenset({"domain"}),
    "supervisor": frozenset({"domain", "engines"}),
    "storage": frozenset({"domain"}),
    "control": frozenset({"domain", "scheduler", "errors", "engines", "gpu"}),
    "llm_api": frozenset({"domain", "scheduler", "engines", "errors", "admission", "control"}),
    "admission": frozenset({"domain", "errors", "llm_api"}),
    "observability": _BELOW_SERVING | {"", "api"},
    "proxy": _BELOW_SERVING | {"api"},
    "api": _BELOW_SERVING | {"", "proxy"},
    "config": frozenset({"domain", "engines", "scheduler"}),
    "app": frozenset({"*"}),
    "cli": frozenset({"*"}),
    "lab": frozenset({"domain", "scheduler", "engines", "errors", "gpu", "config", ""}),
    "tools": frozenset({"*"}),
    "__main__": frozenset({"cli"}),
    "": frozenset({"*"}),
}
"""What each folder may import of the router; `` is the package itself, for its version; `*` is all."""

ONLY_IN: Mapping[str, frozenset[str]] = {
    "pynvml": frozenset({"router/gpu/nvml.py"}),
    "uvloop": frozenset({"router/cli/main.py"}),
    "prometheus_client": frozenset({"router/observability/metrics.py", "router/api/admin.py"}),
    "random": frozenset[str](),
    "pickle": frozenset[str](),
}
"""Libraries that have one home; `random` has a home below `router/sim` and `router/rig` as well."""

CORE_LIBRARIES = frozenset(
    ("__future__", "abc", "bisect", "collections", "dataclasses", "enum", "fractions", "functools", "heapq",
     "itertools", "math", "operator", "re", "types", "typing")
)  # fmt: skip
"""Standard modules without clock, socket, environment, file or random source."""

ENTRY_POINTS = frozenset(
    {
        "router.__main__",
        "router.cli.check_config",
        "router.cli.main",
        "router.tools.generate_docs",
        "router.lab.emulator.runner",
        "router.lab.emulator.server",
        "router.lab.simulator.chaos",
        "router.cli.simulate",
        "router.lab.plot",
        "router.cli.status",
    }
)
"""Modules that are started by name, so that no other module need import them."""


def test_each_layer_imports_only_what_it_may() -> None:
    offences: list[str] = []
    for module in MODULES:
        for name, line in module.imports:
            if name.split(".")[0] == "router" and not _may_import(module.layer, layer_of(name)):
                offences.append(f"{module.where}:{line} ({module.layer}) imports {name}")
    none_of(offences)


def _may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    allowed = MAY_IMPORT.get(importer, frozenset())
    return imported in allowed or "*" in allowed


def test_each_layer_has_its_place_in_the_order() -> None:
    none_of([f"{m.where}: say in MAY_IMPORT what `{m.layer}` may import" for m in MODULES
             if m.layer not in MAY_IMPORT])  # fmt: skip


def test_deciding_uses_nothing_that_has_a_clock_a_socket_or_a_file() -> None:
    pure = [m for m in MODULES if m.layer in ("domain", "scheduler")]
    none_of([f"{m.where}:{line} imports {name}" for m in pure for name, line in m.imports
             if name.split(".")[0] not in CORE_LIBRARIES | {"router"}])  # fmt: skip


def test_libraries_with_one_home_are_imported_nowhere_else() -> None:
    offences = [
        f"{m.where}:{line} imports {name}"
        for m in MODULES
        for name, line in m.imports
        if name.split(".")[0] in ONLY_IN
        and m.where not in ONLY_IN[name.split(".")[0]]
        and not (name == "random" and m.layer == "lab")
    ]
    none_of(offences)


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


def test_nothing_is_imported_inside_a_function() -> None:
    offences: list[str] = []
    for module in (*MODULES, *TESTS):
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                offences += [f"{module.where}:{node.lineno}" for node in ast.walk(function)
                             if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    none_of(offences)


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


def test_each_module_says_what_it_is_for() -> None:
    none_of([m.where for m in (*MODULES, *TESTS) if m.tree.body and not ast.get_docstring(m.tree)])


BANNED_NAMES = frozenset(
    {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base", "stuff", "singleton"}
)


def test_no_module_is_named_for_nothing() -> None:
    none_of([m.where for m in MODULES if m.path.stem in BANNED_NAMES])


BANNED_CALLS: Mapping[str, str] = {
    "time.time": "wall time jumps: use a monotonic clock that is passed in",
    "time.sleep": "nothing sleeps: wait for what you wait for",
    "os.environ": "only router/config/settings.py reads the environment",
    "os.getenv": "only router/config/settings.py reads the environment",
    "asyncio.create_task": "a task needs an owner: use a TaskGroup",
    "asyncio.ensure_future": "a task needs an owner: use a TaskGroup",
}
ENVIRONMENT_READERS = frozenset({"router/config/settings.py", "router/lab/emulator/server.py"})
"""One for each program: the router and the emulated server."""


def test_banned_names_are_not_used() -> None:
    offences: list[str] = []
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                offences.append(f"{module.where}:{node.lineno} global {', '.join(node.names)}")
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            is_reader = module.where in ENVIRONMENT_READERS and name == "os.environ"
            if name in BANNED_CALLS and not is_reader:
                offences.append(f"{module.where}:{node.lineno} {name}: {BANNED_CALLS[name]}")
    none_of(offences)


def test_tests_patch_nothing_and_do_not_sleep() -> None:
    offences: list[str] = []
    for module in TESTS:
        patches = [(name, line) for name, line in module.imports if name.startswith("unittest.mock")]
        offences += [f"{module.where}:{line} imports {name}" for name, line in patches]
        for node in ast.walk(module.tree):
            is_patch = isinstance(node, ast.arg) and node.arg in ("monkeypatch", "mocker")
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            pauses = name == "time.sleep" or (name == "asyncio.sleep" and ast.unparse(node) != "asyncio.sleep(0)")
            if is_patch or (pauses and module.where != "tests/support/waiting.py"):
                offences.append(f"{module.where}:{getattr(node, 'lineno', 0)} {ast.unparse(node)}")
    none_of(offences)


def test_no_ignore_stands_without_its_rule() -> None:
    bare = re.compile(r"#\s*(?:noqa|type:\s*ignore|pyright:\s*ignore)(?![:\[])")
    none_of([f"{m.where}:{at}" for m in (*MODULES, *TESTS) for at, line in enumerate(m.text.splitlines(), 1)
             if bare.search(line) and "re.compile" not in line])  # fmt: skip


def test_no_module_is_dead() -> None:
    used = {name for m in MODULES for name, _ in m.imports} | ENTRY_POINTS
    none_of([m.where for m in MODULES if m.name not in used and m.path.name != "__init__.py"])


def test_every_helper_of_the_tests_is_used() -> None:
    used = {name for m in TESTS for name, _ in m.imports} | {
        f"tests.support.{part}" for m in TESTS for part in re.findall(r"from tests\.support import (\w+)", m.text)
    }
    none_of([m.where for m in TESTS if m.where.startswith("tests/support/") and m.path.stem != "__init__"
             and m.name not in used])  # fmt: skip


PRIVATE = re.compile("|".join((r"/(?:work|farm|root)/[\w.]", r"\bfiles\.pythonhosted" + r"\.org", r"--index-url")))


def test_no_file_names_one_machine_or_registry() -> None:
    own = "tests/test_tidy.py"
    none_of([f"{name}:{at}: {line.strip()[:120]}" for name, text in tracked_texts() if name != own
             for at, line in enumerate(text.splitlines(), 1) if PRIVATE.search(line)])  # fmt: skip
