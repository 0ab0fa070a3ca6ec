"""`llamayard simulate`: output, files and error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from router.cli.main import main


def test_it_prints_a_table_and_writes_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    arguments = ["simulate", "--seconds", "40", "--policy", "llamayard", "--policy", "spread-0.24", "--out", str(out)]
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
    arguments = [
        "simulate",
        "--mix",
        "small",
        "--seconds",
        "30",
        "--rate",
        "100",
        "--policy",
        "spread-0.24",
        "--out",
        "-",
    ]
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
    arguments = [
        "simulate",
        "--mix",
        "small",
        "--seconds",
        "30",
        "--rate",
        "1",
        "--policy",
        "spread-0.24",
        "--out",
        "-",
    ]
    assert main(arguments, {}) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("spread-0.24")
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
        (["--set", "queue.limit"], "write KEY=VALUE"),
        (["--set", "queue.limit=x"], "queue.limit: 'x' (flag) cannot be used"),
        (["--config", "/nonexistent/c.yaml"], "/nonexistent/c.yaml: cannot be read"),
        (["--set", "models={m: {gpus: [7]}}"], "models.m.gpus: '7' is no GPU"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags], {}) == 2
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


def _figures(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    arguments = ["simulate", "--json", "--policy", "llamayard", "--seconds", "60", *flags]
    assert main(arguments, {}) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_nothing_is_written_unless_it_is_asked_for(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "router", "simulate", "--seconds", "20", "--policy", "spread-0.24"]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=True, capture_output=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
    assert main(["simulate", "--seconds", "20", "--policy", "spread-0.24", "--output", str(tmp_path / "runs")], {}) == 0
    assert (tmp_path / "runs" / "4x3090-team-spread-0.24-1.json").is_file()
    assert main(["simulate", "--seconds", "20", "--policy", "spread-0.24", "--output", "/dev/null/x"], {}) == 2
    assert "--output /dev/null/x: cannot be written" in capsys.readouterr().err


def test_refused_requests_are_apart_and_do_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = _figures(capsys, "--rig", "3090", "--mix", "llama3.1:8b,llama3.3:70b", "--rate", "0.3")
    assert run["refused"] > 0
    assert (run["failed"], run["served"] + run["refused"]) == (0, run["requests"])
    assert run["large"]["count"] == 0
    assert run["small"]["p99"] < 60.0


def test_several_seeds_have_a_row_of_means(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--seconds", "30", "--policy", "spread-0.24", "--policy", "llamayard"]
    assert main([*arguments, "--seed", "1", "--seed", "2"], {}) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["spread-0.24", "1"], ["llamayard", "1"], ["spread-0.24", "2"], ["llamayard", "2"],
        ["spread-0.24", "mean"], ["llamayard", "mean"],
    ]  # fmt: skip
    counts = [float(row[2]) for row in rows]
    assert counts[4] == (counts[0] + counts[2]) / 2
    assert main([*arguments, "--seed", "1"], {}) == 0
    assert "mean" not in capsys.readouterr().out
    assert main([*arguments, "--seed", "1", "--seed", "2", "--json"], {}) == 0
    data = json.loads(capsys.readouterr().out)
    spread = [run for run in data["runs"] if run["policy"] == "spread-0.24"]
    assert data["means"]["spread-0.24"]["jain"] == pytest.approx(sum(run["jain"] for run in spread) / 2)
    assert list(data["means"]) == ["spread-0.24", "llamayard"]


def test_settings_of_the_user_change_the_router_and_the_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = _figures(capsys)
    assert _figures(capsys, "--set", "queue.limit=512") == plain
    assert _figures(capsys, "--set", "queue.limit=0")[0]["refused"] > 0
    config = tmp_path / "c.yaml"
    config.write_text("ollama: {num_parallel: 8}\n", encoding="utf-8")
    assert _figures(capsys, "--config", str(config)) != plain
    pinned = _figures(capsys, "--mix", "llama3.1:8b", "--set", "models={'llama3.1:8b': {gpus: [2], replicas_max: 1}}")
    assert [share > 0 for share in pinned[0]["busy_shares"]] == [False, False, True, False]
