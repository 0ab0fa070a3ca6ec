"""`llamayard usage`: table, CSV, JSON, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from router.app.usage import today
from router.cli.main import main
from router.domain.usage import UsageTotals
from router.storage.usage_store import UsageStore

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a state directory with three days of usage."""
    store = UsageStore(tmp_path / "usage.sqlite", 400)
    for age in range(3):
        day = (today() - timedelta(days=age)).isoformat()
        store.add(day, {("user:ann", "llama3.3:70b"): UsageTotals(1, 1_000_000, 500_000, 3600.0, 300.0)})
        store.add(day, {("10.0.0.9", "qwen3:8b"): UsageTotals(2, 10, 20, 1.25, 0.5)})
    store.close()
    return ["--set", f"state_directory={tmp_path}"]


def _json(arguments: list[str], capsys: Captured) -> dict[str, Any]:
    assert main(["usage", "--json", *arguments], {}) == 0
    return json.loads(capsys.readouterr().out)


def test_usage_is_shown_by_client_and_model_with_a_total(arguments: list[str], capsys: Captured) -> None:
    assert main(["usage", *arguments], {}) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == f"USAGE SINCE {today() - timedelta(days=29)}"
    assert head.split() == ["CLIENT", "MODEL", "REQUESTS", "PROMPT", "OUTPUT", "GPU", "SECONDS", "EST.", "WH"]
    assert [line.split() for line in lines] == [
        ["10.0.0.9", "qwen3:8b", "6", "30", "60", "3.8", "1.5"],
        ["user:ann", "llama3.3:70b", "3", "3,000,000", "1,500,000", "10,800.0", "900.0"],
        ["total", "9", "3,000,030", "1,500,060", "10,803.8", "901.5"],
    ]
    assert all(len(line) <= 100 for line in lines)


def test_as_json_it_has_the_documented_shape(arguments: list[str], capsys: Captured) -> None:
    document = _json(["--by", "key", "--since", "1d", *arguments], capsys)
    ann = {"requests": 1, "prompt_tokens": 1_000_000, "output_tokens": 500_000, "gpu_seconds": 3600.0,
           "energy_wh_estimate": 300.0}  # fmt: skip
    other = {"requests": 2, "prompt_tokens": 10, "output_tokens": 20, "gpu_seconds": 1.25, "energy_wh_estimate": 0.5}
    assert document == {
        "since": today().isoformat(),
        "by": ["client"],
        "rows": [{"client": "10.0.0.9", **other}, {"client": "user:ann", **ann}],
        "total": {name: ann[name] + other[name] for name in ann},
    }


def test_csv_has_one_line_for_each_group(arguments: list[str], capsys: Captured) -> None:
    assert main(["usage", "--csv", "--by", "day,model", "--since", "2d", *arguments], {}) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    days = [(today() - timedelta(days=age)).isoformat() for age in (1, 0)]
    assert [(row["day"], row["model"]) for row in rows] == [
        (day, model) for day in days for model in ("llama3.3:70b", "qwen3:8b")
    ]
    assert rows[0]["prompt_tokens"] == "1000000"


def test_with_prices_it_shows_costs(arguments: list[str], capsys: Captured) -> None:
    prices = "usage.prices={llama3.3:70b: {prompt: 0.5, output: 2}, '*': {output: 1000}}"
    document = _json(["--since", "1d", "--set", prices, *arguments], capsys)
    assert [row["cost"] for row in document["rows"]] == [0.02, 1.5]
    assert document["total"]["cost"] == 1.52
    assert main(["usage", "--set", prices, *arguments], {}) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "4.56"


@pytest.mark.parametrize(
    ("wrong", "reported"),
    [
        (["--by", "user"], "--by user: user is unknown: write day, client or model"),
        (["--by", ""], "--by : nothing is unknown: write day, client or model"),
        (["--since", "soon"], "--since soon: write a number of days, such as 7d, or a date"),
        (["--since", "0d"], "--since 0d: write a number of days"),
        (["--set", "usage.prices={a: {input: 1}}"], "a: input is no price: write prompt or output"),
        (["--set", "usage.prices={a: {prompt: -1}}"], "usage.prices"),
    ],
)
def test_a_mistake_is_explained(wrong: list[str], reported: str, arguments: list[str], capsys: Captured) -> None:
    assert main(["usage", *wrong, *arguments], {}) == 2
    assert reported in capsys.readouterr().err


def test_without_usage_it_says_how_to_record_it(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["usage", "--since", "2026-01-01", "--set", f"state_directory={tmp_path}"]
    assert main(arguments, {}) == 1
    assert (
        capsys.readouterr().err
        == f"llamayard: no usage was recorded since 2026-01-01 in {tmp_path}: usage.enabled is false\n"
    )
    assert main([*arguments, "--set", "usage.enabled=true"], {}) == 1
    assert capsys.readouterr().err == f"llamayard: no usage was recorded since 2026-01-01 in {tmp_path}\n"
    (tmp_path / "usage.sqlite").write_bytes(b"x" * 4096)
    assert main(arguments, {}) == 1
    assert "the usage cannot be read" in capsys.readouterr().err
