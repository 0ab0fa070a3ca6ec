"""`llamayard usage`: what each client used of each model, as a table, CSV or JSON.

Reads the database in the state directory, whether the router runs or not.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from router.app.usage import UsageError, recorded_usage, today
from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.cli.status_tables import Column, Row, render_table
from router.config.inputs import ConfigError
from router.config.settings import Settings
from router.domain.model_names import ANY_MODEL, rule_key
from router.domain.usage import UsageRow, UsageTotals, summarize

FIELDS = ("day", "client", "model")
_SPELLINGS = {"key": "client", **{field: field for field in FIELDS}}
_DAYS_MAX = 3660
_MILLION = 1_000_000
Prices = Mapping[str, Mapping[str, float]]


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if nothing was recorded or the database cannot be read."""
    try:
        settings = inputs_of(arguments, environment).settings()
        by, since = _fields(arguments.by), _since(arguments.since, today())
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    try:
        rows = recorded_usage(settings, since)
    except UsageError as error:
        print_problems([f"the usage cannot be read: {error}; run this as the user of the router"])
        return EXIT_FAILED
    if not rows:
        print_problems([_nothing(settings, since)])
        return EXIT_FAILED
    lines = [_line(dict(zip(by, key, strict=True)), totals, cost) for key, totals, cost in _grouped(rows, by, settings)]
    if arguments.json:
        total = _line({}, *_totals(rows, settings))
        print(json.dumps({"since": since.isoformat(), "by": list(by), "rows": lines, "total": total}, indent=2))
    elif arguments.csv:
        print(_csv(lines), end="")
    else:
        total = _line({by[0]: "total"}, *_totals(rows, settings))
        print(
            render_table(f"USAGE SINCE {since}", _columns(by, has_costs=bool(settings.usage.prices)), [*lines, total])
        )
    return EXIT_OK


def _nothing(settings: Settings, since: date) -> str:
    hint = "" if settings.usage.enabled else ": usage.enabled is false"
    return f"no usage was recorded since {since} in {settings.state_directory}{hint}"


def _fields(text: str) -> tuple[str, ...]:
    """`key,model` -> the fields to group by. Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in _SPELLINGS]
    if unknown:
        raise ConfigError([f"--by {text}: {unknown[0] or 'nothing'} is unknown: write day, client or model"])
    return tuple(dict.fromkeys(_SPELLINGS[name] for name in names))


def _since(text: str, now: date) -> date:
    """`7d` -> the first of the last seven days; a date stays as it is. Raises ConfigError."""
    days = text.removesuffix("d")
    if days.isascii() and days.isdigit() and 1 <= int(days) <= _DAYS_MAX:
        return now - timedelta(days=int(days) - 1)
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError([f"--since {text}: write a number of days, such as 7d, or a date, such as {now}"]) from error


def _grouped(
    rows: Sequence[UsageRow], by: Sequence[str], settings: Settings
) -> list[tuple[tuple[str, ...], UsageTotals, float | None]]:
    """Totals and costs by the fields."""
    members: dict[tuple[str, ...], list[UsageRow]] = {}
    for row in rows:
        members.setdefault(tuple(str(getattr(row, field)) for field in by), []).append(row)
    return [(key, totals, _cost(members[key], settings.usage.prices)) for key, totals in summarize(rows, by).items()]


def _totals(rows: Sequence[UsageRow], settings: Settings) -> tuple[UsageTotals, float | None]:
    return summarize(rows, ())[()], _cost(rows, settings.usage.prices)


def _cost(rows: Sequence[UsageRow], prices: Prices) -> float | None:
    """What the tokens cost; None without prices."""
    if not prices:
        return None
    by_model, cost = {rule_key(name): entry for name, entry in prices.items()}, 0.0
    for row in rows:
        entry = by_model.get(rule_key(row.model)) or by_model.get(ANY_MODEL, {})
        cost += row.totals.prompt_tokens * entry.get("prompt", 0.0) / _MILLION
        cost += row.totals.output_tokens * entry.get("output", 0.0) / _MILLION
    return cost


def _line(fields: Mapping[str, str], totals: UsageTotals, cost: float | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        **fields,
        "requests": totals.requests,
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.output_tokens,
        "gpu_seconds": round(totals.gpu_seconds, 3),
        "energy_wh_estimate": round(totals.energy_wh, 3),
    }
    return line if cost is None else {**line, "cost": round(cost, 6)}


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _columns(by: Sequence[str], *, has_costs: bool) -> tuple[Column, ...]:
    names = tuple(Column(field.upper(), _field(field), is_elastic=field != "day") for field in by)
    numbers = (
        Column("REQUESTS", _number("requests")),
        Column("PROMPT", _number("prompt_tokens")),
        Column("OUTPUT", _number("output_tokens")),
        Column("GPU SECONDS", _number("gpu_seconds", 1)),
        Column("EST. WH", _number("energy_wh_estimate", 1)),
    )
    return (*names, *numbers, *((Column("COST", _number("cost", 2)),) if has_costs else ()))


def _field(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return str(row.get(name, ""))

    return cell


def _number(name: str, digits: int = 0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return f"{row[name]:,.{digits}f}"

    return cell
