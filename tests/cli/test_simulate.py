"""`llamayard simulate`: output, files and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.cli.main import main


def test_it_prints_a_table_and_writes_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    arguments = ["simulate", "--seconds", "40", "--policy", "llamayard", "--policy", "floor", "--out", str(out)]
    assert main(arguments, {}) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SIMULATED 4x3090, mix team")
    assert "llamayard" in printed
    run = json.loads((out / "4x3090-team-llamayard-1.json").read_text(encoding="utf-8"))
    assert run["simulated"] is True
    assert len(run["run"]["gpus"]) == 4
    assert run["run"]["residency_spans"]
    assert run["summary"]["requests"] == len(run["run"]["requests"])
    picture = (out / "4x3090-team-llamayard-1.svg").read_text(encoding="utf-8")
    assert "<svg" in picture
    assert "SIMULATED 4x3090" in picture


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    texts: list[tuple[str, str]] = []
    for name in ("a", "b"):
        folder = tmp_path / name
        assert main(["simulate", "--seconds", "30", "--policy", "llamayard", "--out", str(folder)], {}) == 0
        path = folder / "4x3090-team-llamayard-1.json"
        texts.append((path.read_text(encoding="utf-8"), path.with_suffix(".svg").read_text(encoding="utf-8")))
    assert texts[0] == texts[1]


def test_json_and_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--seconds", "30", "--policy", "stock-0.24", "--seed", "1", "--seed", "2"]
    assert main([*arguments, "--json", "--out", "-"], {}) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(one["policy"], one["seed"]) for one in data["runs"]] == [("stock-0.24", 1), ("stock-0.24", 2)]
    assert data["simulated"] is True


def test_a_rate_beyond_the_trace_is_reported_in_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--mix", "small", "--seconds", "30", "--rate", "100", "--policy", "floor", "--out", "-"]
    assert main(arguments, {}) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--json", "--policy", "stock-0.24"], {}) == 0
    data = json.loads(capsys.readouterr().out)
    there = data["runs"][0]["requests"]
    assert there < 3000
    assert note == (
        f"seed 1: the trace has {there} requests for 30 s ({there / 30:.2f} per second), fewer than the requested 3000 "
        "(100 per second)"
    )
    assert data["notes"] == [note]


def test_a_rate_within_the_trace_needs_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--mix", "small", "--seconds", "30", "--rate", "1", "--policy", "floor", "--out", "-"]
    assert main(arguments, {}) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("floor")
    assert main([*arguments, "--json"], {}) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["notes"], data["runs"][0]["requests"]) == ([], 30)


def test_models_by_name_with_weights(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--rig", "3090", "--mix", "llama3.1:8b=3,llama3.2:3b", "--seconds", "30"]
    assert main([*arguments, "--policy", "llamayard", "--out", "-"], {}) == 0
    assert "SIMULATED 3090" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--mix", "everything"], "team"),
        (["--rig", "4x3091"], "3090"),
        (["--policy", "olla"], "stock-0.24"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--seconds", "-5"], "seconds: -5 must be more than 0"),
        (["--seconds", "nan"], "seconds: nan must be more than 0"),
        (["--rate", "0"], "rate: 0 must be more than 0"),
        (["--users", "0"], "users: 0 must be more than 0"),
        (["--mix", "llama3.1:8b=-1"], "mix: the weight of llama3.1:8b: -1 must be more than 0"),
        (["--mix", "llama3.1:8b=x"], "mix: 'llama3.1:8b=x': expected a number after ="),
        (["--fault", "melts@10"], "slow-disk"),
        (["--fault", "lost"], "KIND@SECONDS"),
        (["--fault", "lost@1.2.3"], "1.2.3"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--out", "-", *flags], {}) == 2
    error = capsys.readouterr().err
    assert error.startswith("llamayard: ")
    assert word in error
    assert "Traceback" not in error


FAULTS = ("dies@20:1", "lost@10+15:1", "hot@5+30=3", "foreign@5+30:2=0.5", "slow-disk@0=0.2", "hang-up@0=4")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_can_be_injected_and_is_marked(fault: str, tmp_path: Path) -> None:
    arguments = ["simulate", "--seconds", "60", "--cold", "--policy", "llamayard", "--check", "--fault", fault]
    assert main([*arguments, "--out", str(tmp_path)], {}) == 0
    run = json.loads((tmp_path / "4x3090-team-llamayard-1.json").read_text(encoding="utf-8"))["run"]
    if fault.startswith("hang-up"):
        assert "hung up" in {request["outcome"] for request in run["requests"]}
    else:
        ((at, note),) = run["notes"]
        assert fault.startswith(f"{note.rpartition(' ')[0].replace(' ', '-')}@{at:.0f}")


def test_a_fault_changes_the_run(tmp_path: Path) -> None:
    texts: list[str] = []
    for number, faults in enumerate(([], ["--fault", "hot@0=3"])):
        folder = tmp_path / str(number)
        main(["simulate", "--seconds", "40", "--policy", "stock-0.24", *faults, "--out", str(folder)], {})
        texts.append((folder / "4x3090-team-stock-0.24-1.json").read_text(encoding="utf-8"))
    assert texts[0] != texts[1]
