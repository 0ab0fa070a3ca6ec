"""The screen of `llamayard top` as lines of text: GPUs, models with their streams, the queue. Pure.

Fits any width from 60 columns; what does not fit into the height is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.cli.loaded_models import GIB, loaded_models
from router.cli.ps import pin_text

Row = Mapping[str, Any]
SORTS: tuple[str, ...] = ("model", "streams", "size", "gpu")
_WIDTH_MIN = 60
_KEYS = "q quit   s sort   ↑↓ or jk select   Enter explain"
_BAR_WIDTH = 12


@dataclass(frozen=True, slots=True)
class View:
    """What the user looks at."""

    sort: str = SORTS[0]
    selected: str = ""
    """Name of a model; "" for the first."""


def models_of(status: Row, view: View) -> list[dict[str, Any]]:
    """One row a replica in the view's order, then the models that only wait."""
    rows = loaded_models(status)
    waiting = _waiting_by_model(status)
    for row in rows:
        row["waiting"] = waiting.pop(row["model"], 0)
    rows += [
        {"model": name, "instance": "-", "gpus": [], "state": "waiting", "size_bytes": 0, "in_flight": 0, "slots": 0,
         "pin": None, "waiting": count}
        for name, count in sorted(waiting.items())
    ]  # fmt: skip
    keys: dict[str, Callable[[dict[str, Any]], Any]] = {
        "model": lambda row: row["model"],
        "streams": lambda row: (-row["in_flight"], -row["waiting"]),
        "size": lambda row: -row["size_bytes"],
        "gpu": lambda row: row["gpus"] or ["~"],
    }
    return sorted(rows, key=keys[view.sort])


def next_sort(view: View) -> View:
    return replace(view, sort=SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)])


def moved(view: View, names: Sequence[str], by: int) -> View:
    """The selection moved among the models, which are listed once each in the order of the screen."""
    if not names:
        return view
    at = names.index(view.selected) if view.selected in names else 0
    return replace(view, selected=names[max(0, min(len(names) - 1, at + by))])


def names_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["model"]) for row in rows))


def frame(status: Row, view: View, columns: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `columns` characters."""
    rows = models_of(status, view)
    names = names_of(rows)
    selected = view.selected if view.selected in names else (names or [""])[0]
    width = max(columns, _WIDTH_MIN)
    head = [_title(status, width), "", *_gpu_lines(status, width), ""]
    foot = ["", *_queue_lines(status, width)]
    room = max(3, lines - len(head) - len(foot) - 2)
    shown = [*head, *_model_lines(rows, view, selected, width, room), *foot]
    kept = [*shown[: max(1, lines - 1)], _KEYS] if lines > 1 else shown[:1]
    return [_printable(line[:columns]) for line in kept]


def _title(status: Row, width: int) -> str:
    running = sum(row["in_flight"] for row in status.get("models") or ())
    queue: Row = status.get("queue") or {}
    left = f"llamayard {status.get('version', '')}  streams {running}  waiting {queue.get('waiting', 0)}"
    emulated = str(status.get("emulated") or "")
    return f"{left}  {emulated}"[:width].rstrip()


def _gpu_lines(status: Row, width: int) -> list[str]:
    gpus: Sequence[Row] = status.get("gpus") or ()
    lines = [f"{'GPU':<4}{'VRAM':<{_BAR_WIDTH + 2}}{'USED':>12}{'FREE':>10}{'LOAD':>7}{'POWER':>8}{'°C':>5}"]
    for gpu in gpus:
        total, used = gpu.get("memory_total_bytes") or 0, gpu.get("memory_used_bytes")
        if gpu.get("lost") or used is None or not total:
            lines.append(f"{gpu.get('index', '?'):<4}lost: {gpu.get('error') or 'cannot be read'}"[:width])
            continue
        full = round(_BAR_WIDTH * used / total)
        bar = "█" * full + "░" * (_BAR_WIDTH - full)
        notes = [word for word in ("drained", "hot", "unfit") if gpu.get(word)]
        lines.append(
            f"{gpu['index']:<4}{bar}  {used / GIB:>5.1f}/{total / GIB:<5.1f}G{(total - used) / GIB:>9.1f}G"
            f"{_percent(gpu.get('utilization_ratio')):>7}{_watts(gpu.get('power_draw_watts')):>8}"
            f"{_number(gpu.get('temperature_celsius')):>5} {' '.join(notes)}".rstrip()[:width]
        )
    return lines if gpus else ["no GPUs: models run on the CPU"]


def _model_lines(rows: Sequence[Row], view: View, selected: str, width: int, room: int) -> list[str]:
    name_width = max(18, min(36, width - 58))
    where_width = max(10, min(18, width - name_width - 48))
    titles = (("MODEL", "model", name_width), ("GPU", "gpu", 8), ("INSTANCE", "", where_width), ("STATE", "", 10),
              ("STREAMS", "streams", 9), ("WAIT", "", 6), ("SIZE", "size", 7), ("PIN", "", 0))  # fmt: skip
    head = "  " + "".join(f"{title + ('*' if sort == view.sort else ''):<{size}}" for title, sort, size in titles)
    if not rows:
        return [head.rstrip()[:width], "  no model is loaded"]
    at = next(at for at, row in enumerate(rows) if row["model"] == selected)
    first = max(0, min(at - room + 2, len(rows) - room + 1)) if len(rows) > room - 1 else 0
    shown = rows[first : first + room - 1]
    lines = [head.rstrip()[:width]]
    for row in shown:
        cells = (
            _cut(str(row["model"]), name_width - 1).ljust(name_width),
            _cut(",".join(row["gpus"]) or ("CPU" if row["slots"] else "-"), 7).ljust(8),
            _cut(str(row["instance"]), where_width - 1).ljust(where_width),
            str(row["state"])[:9].ljust(10),
            f"{row['in_flight']}/{row['slots']}".ljust(9),
            str(row["waiting"] or "").ljust(6),
            (f"{row['size_bytes'] / GIB:.1f}G" if row["size_bytes"] else "-").ljust(7),
            pin_text(row["pin"] or {}),
        )
        lines.append((("> " if row["model"] == selected else "  ") + "".join(cells)).rstrip()[:width])
    hidden = len(rows) - len(shown)
    return [*lines, f"  … {hidden} more"] if hidden else lines


def _queue_lines(status: Row, width: int) -> list[str]:
    waiting: Sequence[Row] = status.get("waiting") or ()
    if not waiting:
        return ["QUEUE  empty"]
    lines = [f"QUEUE  {len(waiting)} waiting"]
    for row in waiting[:5]:
        expected = row.get("expected_wait_seconds")
        wait = "?" if expected is None else f"{expected:.0f} s"
        text = f"  {row['model']}  waited {row['waited_seconds']:.0f} s, expects {wait}: {row.get('reason') or ''}"
        lines.append(text[:width])
    return [*lines, f"  … {len(waiting) - 5} more"] if len(waiting) > 5 else lines


def _waiting_by_model(status: Row) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in status.get("waiting") or ():
        counts[str(row["model"])] = counts.get(str(row["model"]), 0) + 1
    return counts


def _printable(text: str) -> str:
    """Without characters that a terminal would obey, which a server's words may contain."""
    return "".join(character if character.isprintable() else " " for character in text)


def _cut(text: str, width: int) -> str:
    """The beginning and the end, where the tag of a model is."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def _percent(ratio: object) -> str:
    return f"{ratio:.0%}" if isinstance(ratio, int | float) else "-"


def _watts(value: object) -> str:
    return f"{value:.0f}W" if isinstance(value, int | float) else "-"


def _number(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) else "-"
