"""The status document as text of at most 100 columns: one table for each kind of thing. Pure.

A missing value is shown as a dash. Long names are shortened in the middle; reasons follow their row on lines of their
own.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

WIDTH = 100
_GIB = 1024**3
_INDENT = "  "
_SHORTENED_MIN = 10
_REASON_LINES_MAX = 4
_LOG_LINES_SHOWN = 3
_LOG_PREFIX = re.compile(r"\btime=\S+ level=\S+ source=\S+ (?:msg=)?")
_NAME_PREFIX = re.compile(r"^NVIDIA (GeForce )?| \(emulated\)$")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `is_elastic` columns are shortened where a table would be too wide."""

    title: str
    cell: Callable[[Row], str]
    is_elastic: bool = False


def render_status(status: Mapping[str, Any]) -> str:
    """The document as text: GPUs, instances, models, loads, missing warm models, pulls, queue, waiting requests."""
    indices = {str(row.get("uuid")): str(row.get("index")) for row in _rows(status, "gpus")}
    missing = _rows(status, "warm_missing")
    parts = [
        *([str(status["emulated"])] if status.get("emulated") else []),
        *_problems(status.get("problems")),
        render_table("GPUS", _GPUS, _rows(status, "gpus"), _gpu_note),
        *_restart(status.get("restart")),
        render_table("INSTANCES", _instance_columns(indices), _rows(status, "instances"), _instance_note),
        render_table("MODELS", _MODELS, _rows(status, "models"), _model_note),
        *([render_table("PINS", _PINS, _rows(status, "pins"))] if status.get("pins") else []),
        render_table("RESERVATIONS", _RESERVATIONS, _rows(status, "reservations")),
        *([render_table("WARM MODELS THAT ARE MISSING", _WARM_MISSING, missing, _reason)] if missing else []),
        *([render_table("PULLS", _PULLS, _rows(status, "pulls"))] if status.get("pulls") else []),
        f"QUEUE\n{_INDENT}{_queue(status.get('queue'))}",
        *([render_table("WAITING", _WAITING, _rows(status, "waiting"))] if status.get("waiting") else []),
    ]
    return "\n\n".join(parts)


def short_reason(reason: str) -> str:
    """A failure and the server's last lines, without log prefixes and the line that lists its environment.

    An Ollama server's first line is its whole environment, 1.4 kB.
    """
    failure, separator, output = reason.partition("; last lines: ")
    lines = [line for line in output.split(" | ") if "env=map[" not in line and 'env="map[' not in line]
    lines = [_LOG_PREFIX.sub("", line).strip() for line in lines[-_LOG_LINES_SHOWN:]]
    return f"{failure}{separator}{' | '.join(lines)}" if any(lines) else failure


def _rows(status: Mapping[str, Any], key: str) -> list[Row]:
    value: object = status.get(key)
    return (
        [cast("Row", item) for item in cast("list[object]", value) if isinstance(item, Mapping)]
        if isinstance(value, list)
        else []
    )


def render_table(
    title: str, columns: Sequence[Column], rows: Sequence[Row], note: Callable[[Row], str] | None = None
) -> str:
    """`note`: text for the lines below a row; "" adds none."""
    if not rows:
        return f"{title}\n{_INDENT}none"
    cells = [[column.cell(row) for column in columns] for row in rows]
    widths = _widths(columns, cells)
    lines = [title, _line([column.title for column in columns], widths)]
    for row, texts in zip(rows, cells, strict=True):
        lines += [_line(texts, widths), *(_wrapped(note(row)) if note is not None else [])]
    return "\n".join(lines)


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[int]:
    """Widths of the columns, the elastic ones made narrower, the widest first, until a line fits."""
    widths = [max(len(column.title), *(len(row[at]) for row in cells)) for at, column in enumerate(columns)]
    elastic = [at for at, column in enumerate(columns) if column.is_elastic]
    while elastic and sum(widths) + 2 * len(widths) > WIDTH:
        widest = max(elastic, key=lambda at: widths[at])
        if widths[widest] <= _SHORTENED_MIN:
            break
        widths[widest] -= 1
    return widths


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    texts = (_shortened(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=True))
    return (_INDENT + "  ".join(texts)).rstrip()


def _shortened(text: str, width: int) -> str:
    """The beginning and the end, where the tag of a model is."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def _wrapped(note: str) -> list[str]:
    indent = _INDENT * 2
    return textwrap.wrap(
        note, WIDTH, initial_indent=indent, subsequent_indent=indent, max_lines=_REASON_LINES_MAX, placeholder=" …"
    )


def _gpu_note(row: Row) -> str:
    notes = [f"error: {row['error']}"] if row.get("error") else []
    if row.get("unfit"):
        notes.append(f"out of service: {row['unfit']}")
    elif row.get("drained"):
        notes.append("drained")
    notes += [words for key, words in (("hot", "hot: others are preferred"), ("on_probation", "on probation"))
              if row.get(key)]  # fmt: skip
    return "; ".join(notes)


def _problems(problems: object) -> list[str]:
    if not isinstance(problems, list) or not problems:
        return []
    return ["\n".join(("PROBLEMS", *(line for each in cast("list[object]", problems) for line in _wrapped(str(each)))))]


def _restart(restart: object) -> list[str]:
    if not isinstance(restart, Mapping):
        return []
    row = cast("Mapping[str, Any]", restart)
    current, pending = row.get("instance"), cast("list[str]", row.get("pending") or [])
    words = f"{current} is {row.get('phase')}" if current else "begins"
    return [f"RESTART\n{_INDENT}{words}" + (f"; then {', '.join(pending)}" if pending else "")]


def _unless_ready(row: Row) -> str:
    reason = row.get("reason")
    return short_reason(str(reason)) if reason and row.get("state") != "ready" else ""


def _instance_note(row: Row) -> str:
    return short_reason(_reason(row))


def _reason(row: Row) -> str:
    return str(row.get("reason") or "")


def _model_note(row: Row) -> str:
    failures, ratio, reason = row.get("unload_failures"), row.get("cpu_ratio"), _unless_ready(row)
    notes = [f"{ratio:.0%} on the CPU"] if isinstance(ratio, int | float) and ratio else []
    if isinstance(failures, int) and failures:
        notes.append("its unload failed " + ("once" if failures == 1 else f"{failures} times in a row"))
    return ": ".join(filter(None, (", ".join(notes), reason)))


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) in (None, "") else str(row[key])


def _gib(*keys: str) -> Callable[[Row], str]:
    """The first of the keys that the row has."""

    def cell(row: Row) -> str:
        size = next((row[key] for key in keys if isinstance(row.get(key), int)), None)
        return "-" if size is None else f"{size / _GIB:.1f} GiB"

    return cell


def _gpu_name(row: Row) -> str:
    return _NAME_PREFIX.sub("", str(row.get("name") or "")) or "-"


def _utilization(row: Row) -> str:
    ratio = row.get("utilization_ratio")
    return f"{ratio:.0%}" if isinstance(ratio, int | float) else "-"


def _power(row: Row) -> str:
    draw, limit = row.get("power_draw_watts"), row.get("power_limit_watts")
    if not isinstance(draw, int | float):
        return "-"
    return f"{draw:.0f}/{limit:.0f} W" if isinstance(limit, int | float) else f"{draw:.0f} W"


def _gib_per_gpu(row: Row) -> str:
    value: object = row.get("per_gpu_bytes")
    sizes = list(cast("Mapping[str, int]", value).values()) if isinstance(value, Mapping) else value
    if not isinstance(sizes, list) or not sizes:
        return "-"
    return " + ".join(f"{size / _GIB:.1f}" for size in cast("list[int]", sizes)) + " GiB"


def _slots(row: Row) -> str:
    return f"{row.get('in_flight', '-')}/{row.get('slots', '-')}"


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.0f} s" if isinstance(row.get(key), int | float) else "-"


def _progress(row: Row) -> str:
    done, total = row.get("completed_bytes"), row.get("total_bytes")
    if not isinstance(done, int) or not isinstance(total, int) or not total:
        return "-"
    return f"{done / total:.0%} of {total / _GIB:.1f} GiB"


def _queue(queue: object) -> str:
    if not isinstance(queue, Mapping):
        return "-"
    return ", ".join(f"{key} {value}" for key, value in cast("Mapping[str, Any]", queue).items()) or "empty"


def _instance_columns(indices: Mapping[str, str]) -> tuple[Column, ...]:
    """`indices`: of the GPUs, by UUID."""

    def gpus(row: Row) -> str:
        value: object = row.get("gpus")
        uuids = [str(uuid) for uuid in cast("list[object]", value)] if isinstance(value, list) else []
        return ", ".join(indices.get(uuid, uuid) for uuid in uuids) or "-"

    return (
        Column("INSTANCE", _text("name"), is_elastic=True),
        Column("STATE", _text("state")),
        Column("VERSION", _text("version")),
        Column("URL", _text("url"), is_elastic=True),
        Column("GPUS", gpus),
    )


_GPUS = (
    Column("GPU", _text("index")),
    Column("NAME", _gpu_name, is_elastic=True),
    Column("TOTAL", _gib("memory_total_bytes")),
    Column("USED", _gib("memory_used_bytes")),
    Column("EXTERNAL", _gib("external_bytes")),
    Column("FREE", _gib("memory_free_bytes")),
    Column("LOAD", _utilization),
    Column("POWER", _power),
    Column("°C", _text("temperature_celsius")),
)
_MODELS = (
    Column("MODEL", _text("name"), is_elastic=True),
    Column("INSTANCE", _text("instance"), is_elastic=True),
    Column("STATE", _text("state")),
    Column("SLOTS", _slots),
    Column("PER GPU", _gib_per_gpu, is_elastic=True),
    Column("CONTEXT", _text("context_length")),
)
_RESERVATIONS = (
    Column("LOAD", _text("load_id")),
    Column("INSTANCE", _text("instance"), is_elastic=True),
    Column("PER GPU", _gib_per_gpu, is_elastic=True),
)
_PINS = (
    Column("MODEL", _text("model"), is_elastic=True),
    Column("GPUS", lambda row: ", ".join(row.get("gpus") or ()) or "-"),
    Column("LAYOUT", _text("layout")),
    Column("KEPT WARM", lambda row: "yes" if row.get("keep_warm") else "no"),
    Column("FROM", lambda row: "command, until restart" if row.get("origin") == "run time" else _text("origin")(row)),
)
_WARM_MISSING = (Column("MODEL", _text("model"), is_elastic=True),)
_PULLS = (
    Column("MODEL", _text("model"), is_elastic=True),
    Column("PROGRESS", _progress),
    Column("STATUS", _text("status"), is_elastic=True),
    Column("CLIENTS", _text("clients")),
)
_WAITING = (
    Column("MODEL", _text("model"), is_elastic=True),
    Column("POSITION", _text("position")),
    Column("WAITED", _seconds("waited_seconds")),
    Column("ETA", _seconds("expected_wait_seconds")),
    Column("REQUEST", _text("request_id"), is_elastic=True),
    Column("REASON", _text("reason"), is_elastic=True),
)
