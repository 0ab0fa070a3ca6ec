"""`llamayard init`: what it asks, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from router.cli.first_configuration import Choices, configuration_text
from router.cli.main import main
from router.config.settings import load_settings
from router.domain.gpu import Gpu, GpuUuid
from tests.support.terminal import in_terminal

Captured = pytest.CaptureFixture[str]
GIB = 1024**3


def _gpu(index: int, error: str | None = None) -> Gpu:
    uuid = GpuUuid(f"GPU-{index}")
    return Gpu(uuid, index, "RTX 3090", 24 * GIB, 0, 24 * GIB, error=error)


def _home(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder), "PATH": os.environ["PATH"]}


def _rig(folder: Path, host: str = "") -> str:
    (folder / "rig.yaml").write_text(f"gpus: 4090+3090\nmodels: [llama3.1:8b, nomic-embed-text]\n{host}\n")
    return str(folder / "rig.yaml")


def _init(folder: Path, *arguments: str) -> int:
    return main(["init", "--config", str(folder / "c.yaml"), *arguments], _home(folder))


def test_the_defaults_give_a_file_that_the_check_passes(tmp_path: Path, capsys: Captured) -> None:
    assert _init(tmp_path, "--yes", "--rig", _rig(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "0: NVIDIA GeForce RTX 4090 (emulated), 24.0 GiB" in shown
    assert shown.splitlines()[-1] == f"  llamayard serve --config {tmp_path / 'c.yaml'}"
    assert max(map(len, shown.splitlines()[:3])) <= 100
    text = (tmp_path / "c.yaml").read_text()
    assert "#   1: NVIDIA GeForce RTX 3090 (emulated), 24.0 GiB, GPU-" in text
    assert main(["check-config", "--config", str(tmp_path / "c.yaml")], _home(tmp_path)) == 0


def test_an_existing_file_is_kept_without_force(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "c.yaml").write_text("# mine\n")
    assert _init(tmp_path, "--yes", "--rig", "3090") == 2
    assert "c.yaml exists: --force writes over it" in capsys.readouterr().err
    assert (tmp_path / "c.yaml").read_text() == "# mine\n"
    assert _init(tmp_path, "--yes", "--rig", "3090", "--force") == 0
    assert "# mine" not in (tmp_path / "c.yaml").read_text()


def test_without_a_terminal_nothing_is_asked(tmp_path: Path, capsys: Captured) -> None:
    assert _init(tmp_path, "--rig", "3090") == 2
    assert "standard input is no terminal, so nothing can be asked: --yes takes the defaults" in capsys.readouterr().err
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize(
    ("port", "code", "message"), [("70000", 2, "port 70000: must be a number"), ("x", 2, "port x: must be a number")]
)
def test_a_wrong_answer_writes_nothing(tmp_path: Path, capsys: Captured, port: str, code: int, message: str) -> None:
    assert _init(tmp_path, "--yes", "--rig", "3090", "--port", port) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "c.yaml" in path.name] == []


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path, capsys: Captured) -> None:
    assert main(["init", "--yes", "--rig", "3090", "--config", str(tmp_path / "no" / "c.yaml")], _home(tmp_path)) == 1
    assert "c.yaml: cannot be written: No such file" in capsys.readouterr().err


def test_a_stock_service_and_a_taken_port_are_found(tmp_path: Path, capsys: Captured) -> None:
    rig = _rig(tmp_path, "host: {stock_service: ollama.service is active, port_holder: a stock Ollama}")
    assert _init(tmp_path, "--json", "--rig", rig) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["stock_service"], document["port_holder"]) == ("ollama.service is active", "a stock Ollama")
    assert document["port"] > 11434
    assert [gpu["index"] for gpu in document["gpus"]] == [0, 1]
    assert load_settings(tmp_path / "c.yaml", _home(tmp_path)).server.port == document["port"]


def _asked(folder: Path, arguments: Sequence[str], answers: Sequence[tuple[str, str]]) -> tuple[int, str]:
    with in_terminal(["init", "--config", str(folder / "c.yaml"), *arguments], _home(folder), 120) as terminal:
        for question, answer in answers:
            terminal.read_until(question)
            terminal.type(f"{answer}\n")
        return terminal.end(), terminal.output


def test_questions_are_answered_in_a_terminal(tmp_path: Path) -> None:
    answers = [
        ("Port for clients (Ollama's own is 11434)", "18434"),
        ("May other machines use it, with access keys? (yes/no) [no]", "yes"),
        ("A model to keep loaded at all times (llama3.1:8b, nomic-embed-text:latest) [none]", "nomic-embed-text"),
    ]
    code, shown = _asked(tmp_path, ["--rig", _rig(tmp_path)], answers)
    assert code == 0, shown
    config = tmp_path / "c.yaml"
    commands = shown.split("next:")[1].split("\r\n")
    assert commands[1] == f"  llamayard keys create NAME --config {config}"
    assert main(["check-config", "--config", str(config)], _home(tmp_path)) == 2, "other machines need keys"
    assert main(["keys", "create", "anna", "--config", str(config)], _home(tmp_path)) == 0
    assert main(["check-config", "--config", str(config)], _home(tmp_path)) == 0
    tree = yaml.safe_load(config.read_text())
    assert tree["server"] == {"host": "0.0.0.0", "port": 18434}
    assert tree["models"] == {"nomic-embed-text:latest": {"keep_warm": True}}


def test_the_folder_of_the_models_is_asked_for(tmp_path: Path) -> None:
    answers = [("Port for clients", ""), ("May other machines", ""), ("Folder of the models", "~/my models")]
    code, shown = _asked(tmp_path, [], answers)
    assert code == 0, shown
    assert load_settings(tmp_path / "c.yaml", _home(tmp_path)).ollama.models == tmp_path / "my models"


def test_what_cannot_be_used_is_asked_for_again(tmp_path: Path) -> None:
    answers = [
        ("Port for clients", "99999"), ("99999: must be a number from 0 to 65535", ""),
        ("May other machines", "maybe"), ("maybe: answer yes or no", "no"),
        ("A model to keep loaded", "other"), ("other:latest is not among the models", "llama3.1:8b"),
    ]  # fmt: skip
    code, shown = _asked(tmp_path, ["--rig", _rig(tmp_path)], answers)
    assert code == 0, shown
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["models"] == {"llama3.1:8b": {"keep_warm": True}}


@pytest.mark.parametrize("store", [None, Path("/a/b c"), Path("/models: x # y"), Path('/quo"te')])
@pytest.mark.parametrize("gpus", [(), (_gpu(0),), (_gpu(0), _gpu(1, "lost"), _gpu(2))])
@pytest.mark.parametrize("warm", ["", "llama3.1:8b"])
def test_every_file_loads_and_so_do_its_commented_rules(
    tmp_path: Path, store: Path | None, gpus: tuple[Gpu, ...], warm: str
) -> None:
    text = configuration_text(Choices(11500, False, store, warm), gpus, "no driver")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    settings = load_settings(path, _home(tmp_path))
    assert (settings.server.port, list(settings.models)) == (11500, [warm] if warm else [])
    assert store is None or settings.ollama.models == store
    head, rules = text.split("# Rules for single models.")
    path.write_text(head + "\n".join(["#" + rules.split("\n")[0], *(
        line.removeprefix("# ").removeprefix("#") for line in rules.split("\n")[1:])]))  # fmt: skip
    assert load_settings(path, _home(tmp_path)).aliases
