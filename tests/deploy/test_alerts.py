"""The Prometheus alert rules: played by promtool, and compared with what the router exports."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.exported import exported_names
from tests.support.promtool import promtool

RULES = "deploy/prometheus-alerts.yaml"
RUNBOOK = "https://github.com/llamayard/llamayard/blob/main/docs/operations.md"
PLAYED = "tests/deploy/alerts.test.yaml"


def _rules(root: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((root / RULES).read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def test_the_rules_fire_when_they_should(root: Path) -> None:
    command = [promtool(), "test", "rules", PLAYED]
    played = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr


def test_every_rule_is_played_until_it_fires(root: Path) -> None:
    tests = yaml.safe_load((root / PLAYED).read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in _rules(root)}


def test_every_rule_has_a_severity_and_a_summary(root: Path) -> None:
    rules = _rules(root)
    assert {rule["labels"]["severity"] for rule in rules} == {"critical", "warning"}
    assert all(rule["annotations"]["summary"] for rule in rules)


def test_every_alert_links_to_its_section_of_the_runbook(root: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", (root / "docs/operations.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for rule in _rules(root):
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (page, anchor) == (RUNBOOK, rule["alert"].lower())
        assert anchor in anchors
    alerts = {heading for heading in headings if heading.startswith("Llamayard")}
    assert alerts == {rule["alert"] for rule in _rules(root)}


def test_every_metric_of_the_rules_is_exported(root: Path) -> None:
    named = {name for rule in _rules(root) for name in re.findall(r"\bllamayard_\w+", rule["expr"])}
    assert named <= exported_names()
