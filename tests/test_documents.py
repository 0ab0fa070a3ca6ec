"""Documents, examples and deployment files match the code."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from router import __version__
from router.config.keys import dotted_keys
from router.config.settings import InstanceSettings, Settings, load_settings
from router.tools.generate_docs import documents
from tests.support.tree import MODULES, ROOT, none_of


@pytest.mark.parametrize("path", sorted(documents()))
def test_generated_documents_have_not_drifted(path: str) -> None:
    target = ROOT / path
    assert target.is_file(), f"{path} is missing: run `make docs`"
    assert target.read_text(encoding="utf-8") == documents()[path], f"{path} has drifted: run `make docs`"


def test_the_example_file_is_the_defaults() -> None:
    home = {"HOME": "/home/someone"}
    assert load_settings(ROOT / "config/llamayard.example.yaml", home) == load_settings(None, home)


def test_the_example_instances_can_be_used(tmp_path: Path) -> None:
    text = (ROOT / "config/llamayard.example.yaml").read_text(encoding="utf-8")
    block = re.search(r"^# instances:\n(?:# .*\n)+", text, re.MULTILINE)
    assert block is not None
    (tmp_path / "c.yaml").write_text(re.sub(r"^# ", "", block[0], flags=re.MULTILINE), encoding="utf-8")
    assert [instance.url is None for instance in load_settings(tmp_path / "c.yaml", {}).instances] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_accepted(path: Path) -> None:
    load_settings(path, {})
    assert _schema_errors(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def _schema_errors(tree: Any) -> list[str]:
    schema = json.loads((ROOT / "config/llamayard.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(tree)]


@pytest.mark.parametrize(
    "tree",
    [
        {"ollama": {"keep_alive": "5m", "env": {"OLLAMA_DEBUG": 1}, "instance_env": {"gpu0": {"A": "b"}}}},
        {"server": None, "placement": {"vram_margin_bytes": "1.5 GiB", "exclusive_gpus": {"0": ["a", "b"]}}},
        {"instances": [{"name": "a", "gpus": [0]}], "server": {"cors_origins": "http://a, http://b"}},
    ],
)
def test_the_schema_accepts_what_the_settings_accept(tree: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    load_settings(tmp_path / "c.yaml", {})
    assert _schema_errors(tree) == []


@pytest.mark.parametrize(
    ("tree", "reported"),
    [
        ({"sever": {}}, "'sever' was unexpected"),
        ({"server": {"prot": 1}}, "is not valid under any"),
        ({"instances": [{"name": "a", "gpu": []}]}, "'gpu' was unexpected"),
        ({"models": {"a": {"option": "pass"}}}, "'option' was unexpected"),
        ({"queue": {"limit": -1}}, "is not valid under any"),
        ({"placement": {"vram_margin_bytes": "many"}}, "is not valid under any"),
    ],
)
def test_the_schema_refuses_unknown_keys_and_wrong_values(tree: object, reported: str) -> None:
    (message,) = _schema_errors(tree)
    assert reported in message


def test_every_key_has_its_description_in_the_schema() -> None:
    text = (ROOT / "config/llamayard.schema.json").read_text(encoding="utf-8")
    described: set[str] = set()

    def visit(node: object) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if name == "properties":
                described.update(key for key, inner in value.items() if "description" in inner)
            visit(value)

    visit(json.loads(text))
    none_of([key for key in dotted_keys(Settings) if key.rpartition(".")[2] not in described])


READERS_OF_KEYS = frozenset({"router/config/settings.py", "router/config/schema.py", "router/tools/generate_docs.py"})


def test_every_key_is_used_somewhere() -> None:
    """As `….server.port` outside the settings; a section that is passed on keeps its name."""
    read: set[str] = set()
    for module in MODULES:
        if module.where not in READERS_OF_KEYS:
            read |= {ast.unparse(node) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    ends = {".".join(chain.split(".")[-2:]) for chain in read} | {chain.rpartition(".")[2] for chain in read}
    keys = {key: "discovers" if key == "discover" else key for key in dotted_keys(Settings)}
    keys |= {f"instances[].{key}": key for key in dotted_keys(InstanceSettings)}
    none_of([key for key, end in keys.items() if end not in ends])


def test_every_key_is_described_with_its_unit_in_its_name() -> None:
    offences: list[str] = []
    for model in (Settings, InstanceSettings, *_sections()):
        for name, info in model.model_fields.items():
            is_section = info.annotation in _sections()
            if not is_section and not (info.description or "").endswith("."):
                offences.append(
                    f"{model.__name__}.{name}: its description must be a sentence that ends with a full stop"
                )
            metadata = str(info.metadata)
            if info.annotation is float and not name.endswith("_seconds") and "keep_alive" not in metadata:
                offences.append(f"{model.__name__}.{name}: a duration carries its unit in its name")
    none_of(offences)


def _sections() -> list[type]:
    annotations = [info.annotation for info in Settings.model_fields.values()]
    return [each for each in annotations if isinstance(each, type) and hasattr(each, "model_fields")]


HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$")
CHANGES = frozenset({"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"})


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    matches = [HEADING.match(line) for line in headings]
    assert all(matches), headings
    versions = [match["version"] for match in matches if match]
    assert versions[0] == "Unreleased"
    assert all(match["date"] for match in matches[1:] if match), "a released version carries its date"
    assert {line[4:] for line in lines if line.startswith("### ")} <= CHANGES
    assert versions[1:] == [] or versions[1] == __version__


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def test_links_between_documents_lead_somewhere() -> None:
    offences: list[str] = []
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        targets: list[str] = LINK.findall(path.read_text(encoding="utf-8"))
        offences += [f"{path.relative_to(ROOT)}: {target}" for target in targets if not (path.parent / target).exists()]
    none_of(offences)


def test_files_that_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:router|tests|config|deploy|docs)/[\w./-]+)`", text))
    assert named
    none_of([name for name in sorted(named) if not (ROOT / name).exists()])


NAME_TARGETS = [ROOT / name for name in (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml"
)]  # fmt: skip


def test_every_make_target_that_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for path in NAME_TARGETS
             for target in re.findall(r"\bmake ([a-z-]+)(?=[`\s]|$)", path.read_text(encoding="utf-8"))
             if target in targets or f"`make {target}" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert {"run", "test"} <= named
    none_of([f"make {target}" for target in sorted(named - targets)])


LOCKS: Mapping[str, tuple[str, ...]] = {"requirements.lock": (), "requirements-dev.lock": ("dev",)}
"""Each lock with the extras that it covers."""


def test_locks_cover_every_dependency_by_hash() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    offences: list[str] = []
    for path, extras in LOCKS.items():
        optional = [project["optional-dependencies"][extra] for extra in extras]
        required: list[str] = [*project["dependencies"], *chain.from_iterable(optional)]
        names = {_normalized(re.split(r"[\[><=; ]", requirement)[0]) for requirement in required}
        locked = _locked(path)
        offences += [f"{path} lacks {name}: run `make lock`" for name in sorted(names - locked.keys())]
        offences += [f"{path}: {name} has no hash" for name, entry in locked.items() if "--hash=sha256:" not in entry]
    none_of(offences)


def test_both_locks_name_the_same_versions() -> None:
    runtime, development = (_locked(path) for path in LOCKS)
    none_of([f"{name} differs between the locks: run `make lock`" for name, entry in runtime.items()
             if development.get(name) != entry])  # fmt: skip


def _locked(path: str) -> dict[str, str]:
    """The entries of a lock by normalized package name: version, markers and hashes."""
    text = (ROOT / path).read_text(encoding="utf-8").replace("\\\n", "")
    entries = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {_normalized(name): entry for name, _, entry in (line.partition("==") for line in entries)}


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_deployed_files_agree_with_the_defaults() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
    unit = (ROOT / "deploy/llamayard.service").read_text(encoding="utf-8")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > Settings().server.drain_timeout_seconds
    service = compose["services"]["llamayard"]
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().server.drain_timeout_seconds
    assert any(str(Settings().server.port) in str(port) for port in service["ports"])
