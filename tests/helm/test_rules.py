"""The alert rules: sound by promtool, each proven to fire and to rest, each with a runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.tools import require_program
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "streamrec" / "rules" / "alerts.yaml"
CASES = Path(__file__).with_name("alerts.test.yaml")
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    program = require_program("the alert rules are", "install promtool; Debian's package prometheus has it", "promtool")
    done = subprocess.run([program, *arguments], cwd=CASES.parent, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_sound() -> None:
    promtool("check", "rules", str(RULES))


def test_rules_fire_and_rest() -> None:
    promtool("test", "rules", CASES.name)


def test_every_alert_is_seen_firing_and_resting() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_every_alert_has_its_runbook_and_no_other_exists() -> None:
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE))
    assert sections == {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/runbooks.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")
