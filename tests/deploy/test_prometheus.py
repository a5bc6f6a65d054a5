"""Prometheus's configuration, rules and their tests, by promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
ALERTS = ("Down", "CacheFull", "Preemptions", "QueueGrows", "Errors", "CompressionFell",
          "CanaryForgets", "CanaryLoops", "CanarySilent")  # fmt: skip

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")


def promtool(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_configuration_is_valid() -> None:
    done = promtool("check", "config", "--syntax-only", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_do_what_their_tests_say() -> None:
    done = promtool("test", "rules", "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = (FOLDER / "rules_test.yml").read_text(encoding="utf-8")
    for alert in ALERTS:  # each fires in some test; where it is silent, promtool has checked too
        assert f"alertname: Kvthrift{alert}\n        exp_alerts" in tests, alert


def test_a_rule_that_never_fires_is_noticed(tmp_path: Path) -> None:
    for file in ("rules.yml", "rules_test.yml"):
        text = (FOLDER / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(text.replace("ratio > 0.95", "ratio > 9.5"), encoding="utf-8")
    assert promtool("test", "rules", "rules_test.yml", folder=tmp_path).returncode != 0
