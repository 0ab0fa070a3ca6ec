"""Draws a simulated run: GPU memory by model over time, and waiting and streaming requests.

Usage: `python -m router.lab.plot RUN.json OUT.svg`, with the JSON that `llamayard simulate --out` writes. It runs in
its own process so that only it needs matplotlib (the extra `sim`).
"""

# matplotlib does not type its keyword arguments:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

GB = 1e9
_LOADING_ALPHA = 0.35
_WIDTH_INCHES = 14.0


def main(arguments: list[str]) -> int:
    source, target = Path(arguments[0]), Path(arguments[1])
    data = cast("dict[str, Any]", json.loads(source.read_text(encoding="utf-8")))
    draw(data["title"], data["run"], target)
    return 0


def draw(title: str, run: dict[str, Any], target: Path) -> None:
    """Writes the picture in the format of the file name (svg, png, pdf)."""
    mpl.rcParams["svg.hashsalt"] = "llamayard"  # the same run gives the same file
    gpus: list[dict[str, Any]] = run["gpus"]
    heights = [1.0] * len(gpus) + [1.2]
    figure, axes = pyplot.subplots(
        len(heights), 1, sharex=True, figsize=(_WIDTH_INCHES, 1.6 * len(heights)), height_ratios=heights, squeeze=False
    )
    rows: list[Axes] = [row[0] for row in axes]
    colours = _colours(run)
    for gpu, axis in zip(gpus, rows, strict=False):
        _draw_gpu(axis, gpu, run, colours)
    _draw_queue(rows[-1], run)
    for at, _ in run["notes"]:
        for axis in rows:
            axis.axvline(at, color="red", linewidth=0.8, linestyle=":")
    rows[0].set_xlim(0.0, run["seconds"])
    rows[0].set_title(title, loc="left", fontsize=10)
    rows[-1].set_xlabel("seconds")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else {})
    pyplot.close(figure)


def _colours(run: dict[str, Any]) -> dict[str, Any]:
    names = sorted(
        {span["model"] for span in run["residency_spans"]} | {request["model"] for request in run["requests"]}
    )
    palette = mpl.colormaps["tab20"]
    return {name: palette(index % 20) for index, name in enumerate(names)}


def _draw_gpu(axis: Axes, gpu: dict[str, Any], run: dict[str, Any], colours: dict[str, Any]) -> None:
    """One block per residency span, stacked; pale while loading, hatched if partly on the CPU."""
    blocks: list[tuple[float, float, float, float]] = []
    for span in run["residency_spans"]:
        size = span["bytes"].get(gpu["uuid"], 0) / GB
        if not size:
            continue
        began = span["began"]
        ended = span["ended"] if span["ended"] is not None else run["seconds"]
        ready = span["ready"] if span["ready"] is not None else ended
        bottom = _lowest(blocks, began, ended, size)
        blocks.append((began, ended, bottom, bottom + size))
        hatch = "//" if span["host_bytes"] else None
        colour = colours[span["model"]]
        axis.broken_barh([(began, ready - began)], (bottom, size), facecolor=colour, alpha=_LOADING_ALPHA, hatch=hatch)
        axis.broken_barh([(ready, ended - ready)], (bottom, size), facecolor=colour, edgecolor="white", hatch=hatch)
    axis.set_ylim(0, gpu["usable_bytes"] / GB)
    axis.set_ylabel(f"GPU {gpu['index']}\nGB", fontsize=8)
    axis.tick_params(labelsize=7)


def _lowest(blocks: list[tuple[float, float, float, float]], began: float, ended: float, size: float) -> float:
    """The lowest position at which the block overlaps no other."""
    overlapping = sorted((low, high) for start, end, low, high in blocks if start < ended and began < end)
    bottom = 0.0
    for low, high in overlapping:
        if low - bottom >= size:
            break
        bottom = max(bottom, high)
    return bottom


def _draw_queue(axis: Axes, run: dict[str, Any]) -> None:
    waiting: list[tuple[float, int]] = []
    running: list[tuple[float, int]] = []
    for request in run["requests"]:
        ended = request["ended"] if request["ended"] is not None else run["seconds"]
        first = request["first_token"] if request["first_token"] is not None else ended
        waiting += [(request["arrived"], 1), (first, -1)]
        running += [(first, 1), (ended, -1)]
    for steps, label, colour in (
        (waiting, "waiting for the first token", "tab:red"),
        (running, "streaming", "tab:green"),
    ):
        times, counts = _running_counts(steps)
        axis.step(times, counts, where="post", label=label, color=colour, linewidth=1.0)
    axis.set_ylabel("requests", fontsize=8)
    axis.legend(fontsize=7, loc="upper right", frameon=False)
    axis.tick_params(labelsize=7)


def _running_counts(steps: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
    times, counts, count = [0.0], [0], 0
    for at, change in sorted(steps, key=lambda step: (step[0], -step[1])):
        count += change
        times.append(at)
        counts.append(count)
    return times, counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
