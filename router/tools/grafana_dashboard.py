"""The Grafana dashboard of the metrics, as JSON for provisioning or import.

Written by `router/tools/generate_docs.py`. In its queries `instance` is the router's address and `exported_instance`
the server behind it, as with the scrape configuration in docs/operations.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final, NamedTuple

_COLUMNS: Final = 24
_PANEL_HEIGHT: Final = 8
_STAT_HEIGHT: Final = 4
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_ROUTER: Final = 'instance=~"$router"'
_MODEL: Final = f'{_ROUTER}, model=~"$model"'


class Query(NamedTuple):
    """One line, or group of lines, of a panel."""

    expression: str
    """PromQL, with Grafana's variables `$router`, `$model` and `$__rate_interval`."""
    legend: str = ""


class Panel(NamedTuple):
    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """One of Grafana's units."""
    kind: str = "timeseries"
    """Grafana's type of panel."""
    columns: int = 8
    is_stacked: bool = False


class Row(NamedTuple):
    title: str
    panels: tuple[Panel, ...]


def _rate(name: str, by: str = "", selector: str = _ROUTER) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({name}{{{selector}}}[$__rate_interval]))"


def _quantile(share: float, name: str, by: str = "", selector: str = _MODEL) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({name}_bucket{{{selector}}}[$__rate_interval])))"


def _percentiles(name: str, by: str = "model", selector: str = _MODEL) -> tuple[Query, ...]:
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(Query(_quantile(share, name, by, selector), f"p{share * 100:.0f}{legend}") for share in (0.5, 0.95))


def _gauge(name: str, legend: str, selector: str = _ROUTER) -> Query:
    return Query(f"{name}{{{selector}}}", legend)


def _on_gpu(name: str, what: str = "") -> Query:
    return _gauge(f"llamayard_gpu_{name}", f"GPU {{{{index}}}} {{{{name}}}} {what}".rstrip())


def _stat(title: str, description: str, expression: str, unit: str = "short") -> Panel:
    return Panel(title, description, (Query(expression),), unit, "stat", 3)


OVERVIEW = Row(
    "Overview",
    (
        _stat("Requests/s", "Requests answered.", _rate("llamayard_requests_total"), "reqps"),
        _stat("Running", "Requests in progress.", f"sum(llamayard_requests_running{{{_ROUTER}}})"),
        _stat("Waiting", "Requests waiting for a slot.", f"sum(llamayard_requests_waiting{{{_ROUTER}}})"),
        _stat("TTFT p95", "Arrival to first byte.", _quantile(0.95, "llamayard_time_to_first_token_seconds"), "s"),
        _stat(
            "Generated tokens/s", "Counted when a response ends.",
            _rate("llamayard_tokens_total", selector=f'{_ROUTER}, type="generation"'),
        ),
        _stat("Ready instances", "Servers that serve.", f'sum(llamayard_instance_state{{{_ROUTER}, state="ready"}})'),
        _stat("Lost GPUs", "GPUs that cannot be read.", f"sum(llamayard_gpu_lost{{{_ROUTER}}})"),
        _stat("Missing warm models", "Models with keep_warm that are not loaded.",
              f"sum(llamayard_warm_models_missing{{{_ROUTER}}}) or vector(0)"),
    ),
)  # fmt: skip
REQUESTS = Row(
    "Requests",
    (
        Panel("Time to first token", "Arrival to first byte, by model.",
              _percentiles("llamayard_time_to_first_token_seconds"), "s"),
        Panel("Queue time", "Arrival to granted slot, by model; includes cold loads.",
              _percentiles("llamayard_request_queue_time_seconds"), "s"),
        Panel("Time per output token", "Mean inter-token latency of each streamed response, by model.",
              _percentiles("llamayard_request_time_per_output_token_seconds"), "s"),
        Panel("Duration", "Arrival to last byte, by model.", _percentiles("llamayard_request_duration_seconds"), "s"),
        Panel("Requests by status", "499: the client hung up.",
              (Query(_rate("llamayard_requests_total", "status"), "{{status}}"),), "reqps", is_stacked=True),
        Panel("Running and waiting", "Waiting: for a slot.",
              (_gauge("llamayard_requests_running", "running"), _gauge("llamayard_requests_waiting", "waiting"))),
        Panel("Rejections", "Requests answered with an error, by code.",
              (Query(_rate("llamayard_rejections_total", "code") + " > 0", "{{code}}"),), "reqps"),
        Panel("Retries and broken streams", "Requests sent again, by reason; streams that ended early, by code.",
              (Query(_rate("llamayard_retries_total", "reason"), "retried: {{reason}}"),
               Query(_rate("llamayard_stream_errors_total", "code"), "broken: {{code}}")), "reqps"),
        Panel("Fair share spread", "Most minus fewest weighted tokens that waiting clients have received.",
              (_gauge("llamayard_fair_share_spread_tokens", "tokens"),)),
    ),
)  # fmt: skip
THROUGHPUT = Row(
    "Throughput",
    (
        Panel("Generated tokens/s by replica", "Counted when a response ends.",
              (Query(_rate("llamayard_tokens_total", "model, exported_instance", f'{_MODEL}, type="generation"'),
                     "{{model}} on {{exported_instance}}"),)),
        Panel("Prompt tokens/s by replica", "Counted when a response ends.",
              (Query(_rate("llamayard_tokens_total", "model, exported_instance", f'{_MODEL}, type="prompt"'),
                     "{{model}} on {{exported_instance}}"),)),
        Panel("Slots in use", "Running requests of each replica.",
              (_gauge("llamayard_model_slots_used", "{{model}} on {{exported_instance}}", _MODEL),)),
    ),
)  # fmt: skip
MODELS = Row(
    "Models",
    (
        Panel("Loads", "By outcome; spilled: partly on the CPU, and undone.",
              (Query(_rate("llamayard_loads_total", "outcome", _MODEL), "{{outcome}}"),
               Query(_rate("llamayard_spills_healed_total"), "healed")), "ops"),
        Panel("Unloads", "By cause.",
              (Query(_rate("llamayard_unloads_total", "cause", _MODEL), "{{cause}}"),
               Query(_rate("llamayard_unload_failures_total", selector=_MODEL), "failed")), "ops"),
        Panel("Swaps", "Loads for which other models were unloaded, by the loaded model.",
              (Query(_rate("llamayard_swaps_total", "model", _MODEL), "{{model}}"),), "ops"),
        Panel("Load time", "Successful loads, by model.", _percentiles("llamayard_load_duration_seconds"), "s"),
        Panel("Weights loaded", "The cost of swapping.",
              (Query(_rate("llamayard_load_bytes_total"), "loaded"),), "Bps"),
        Panel("Missing warm models", "1 while a model with keep_warm is not loaded.",
              (_gauge("llamayard_warm_models_missing", "{{model}}"),)),
        Panel("On the CPU", "Share of a loaded model that is on the CPU although its instance has GPUs.",
              (_gauge("llamayard_model_cpu_ratio", "{{model}} on {{exported_instance}}", _MODEL),), "percentunit"),
    ),
)  # fmt: skip
GPUS = Row(
    "GPUs",
    (
        Panel("VRAM by use", "Models, reservations of loads in progress, other programs.",
              (_on_gpu("memory_resident_bytes", "models"), _on_gpu("memory_reserved_bytes", "reserved"),
               _on_gpu("memory_external_bytes", "external"), _on_gpu("memory_unaccounted_bytes", "unaccounted")),
              "bytes", is_stacked=True),
        Panel("VRAM by driver", "Used, free and total.",
              (_on_gpu("memory_used_bytes", "used"), _on_gpu("memory_free_bytes", "free"),
               _on_gpu("memory_total_bytes", "total")), "bytes"),
        Panel("Utilization", "Over the driver's last sample period.", (_on_gpu("utilization_ratio"),), "percentunit"),
        Panel("Temperature", "GPUs slow down from about 85 °C.", (_on_gpu("temperature_celsius"),), "celsius"),
        Panel("Power", "Draw and limit.",
              (_on_gpu("power_draw_watts", "draw"), _on_gpu("power_limit_watts", "limit")), "watt"),
        Panel("Lost and errors", "1 while a GPU cannot be read; new errors per second.",
              (_on_gpu("lost", "lost"),
               Query(_rate("llamayard_gpu_errors_total", "index, name"), "GPU {{index}} {{name}} errors"))),
    ),
)  # fmt: skip
ROUTER = Row(
    "Router",
    (
        Panel("Event-loop lag", "Lateness of a timer: while it is late, so is every byte.",
              _percentiles("llamayard_event_loop_lag_seconds", "", _ROUTER), "s"),
        Panel("CPU", "Of the router's process, in cores.", (Query(_rate("process_cpu_seconds_total"), "cores"),)),
        Panel("Memory", "Resident, of the router's process.",
              (_gauge("process_resident_memory_bytes", "resident"),), "bytes"),
        Panel("Open files", "Of the router's process, with its limit.",
              (_gauge("process_open_fds", "open"), _gauge("process_max_fds", "limit"))),
        Panel("Instances", "Current state of each server.",
              (Query(f"llamayard_instance_state{{{_ROUTER}}} == 1", "{{exported_instance}}: {{state}}"),)),
        Panel("Versions", "Of the router and of its servers.",
              (_gauge("llamayard_build_info", "llamayard {{version}}"),
               _gauge("llamayard_instance_info", "{{exported_instance}}: {{engine}} {{version}}"))),
    ),
)  # fmt: skip
ROWS: Final = (OVERVIEW, REQUESTS, THROUGHPUT, MODELS, GPUS, ROUTER)


def dashboard_document() -> str:
    """The dashboard as JSON."""
    dashboard = {
        "title": "llamayard",
        "uid": "llamayard",
        "description": "Requests, models, GPUs and the router. Generated by `make docs`.",
        "tags": ["llamayard", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }
    return json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"


def queries() -> tuple[str, ...]:
    """The expression of every panel."""
    return tuple(query.expression for row in ROWS for panel in row.panels for query in panel.queries)


def _variables() -> list[dict[str, object]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _label_variable("router", "Router", "label_values(llamayard_build_info, instance)"),
        _label_variable("model", "Model", f"label_values(llamayard_tokens_total{{{_ROUTER}}}, model)"),
    ]


def _label_variable(name: str, label: str, query: str) -> dict[str, object]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> Iterator[dict[str, object]]:
    """All panels with their positions: rows from top to bottom, the panels of each from left to right."""
    number, top = 0, 0
    for row in ROWS:
        number += 1
        yield {
            "id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
        }  # fmt: skip
        top, left = top + 1, 0
        height = _STAT_HEIGHT if row.panels[0].kind == "stat" else _PANEL_HEIGHT
        for panel in row.panels:
            if left + panel.columns > _COLUMNS:
                top, left = top + height, 0
            number += 1
            position = {"x": left, "y": top, "w": panel.columns, "h": height}
            yield {"id": number, "gridPos": position, **_panel(panel)}
            left += panel.columns
        top += height


def _panel(panel: Panel) -> dict[str, object]:
    custom: dict[str, object] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.is_stacked:
        custom = {"fillOpacity": 60, "showPoints": "never", "stacking": {"mode": "normal", "group": "A"}}
    is_stat = panel.kind == "stat"
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **({} if is_stat else {"custom": custom})},
            "overrides": [],
        },
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if is_stat else {"tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
            }
            for at, query in enumerate(panel.queries)
        ],
    }
