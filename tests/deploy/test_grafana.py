"""The dashboard: valid for Grafana, and it asks for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "kvthrift.json"
RULES = GRAFANA.parent / "prometheus" / "rules.yml"
METRIC = re.compile(r"\b(?:vllm|kvthrift):?[a-z0-9_:]*[a-z0-9]|\bhttp_[a-z_]+")
ELSEWHERE = {"kvthrift_loadtest_done_requests", "kvthrift_loadtest_planned_requests",
             "kvthrift_loadtest_failed_requests", "kvthrift_loadtest_running",
             "kvthrift_canary_passkeys_found_ratio", "kvthrift_canary_repetition_ratio",
             "kvthrift_canary_failed_requests", "kvthrift_canary_interval_seconds",
             "kvthrift_canary_last_round_timestamp_seconds"}  # fmt: skip


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checker with its packages, in a folder of its own."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("check")
    for file in ("package.json", "check.mjs"):
        shutil.copy(GRAFANA / "check" / file, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"@grafana/schema cannot be installed: {done.stderr[-300:]}")
    return folder


def verdict(check: Path, dashboard: dict[str, Any]) -> tuple[int, str]:
    file = check / "dashboard.json"
    file.write_text(json.dumps(dashboard), encoding="utf-8")
    command = ["node", "check.mjs", file.name]
    done = subprocess.run(command, cwd=check, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def test_it_is_what_grafana_reads(check: Path) -> None:
    assert verdict(check, dashboard()) == (0, "")


def broken(name: str) -> dict[str, Any]:
    found = dashboard()
    panel = next(p for p in found["panels"] if p["type"] == "timeseries")
    match name:
        case "a field that is not there":
            found["panells"] = []
        case "a size that is a word":
            panel["gridPos"]["h"] = "8"
        case "a legend at the top":
            panel["options"]["legend"]["placement"] = "top"
        case "a line that is drawn wrongly":
            panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] = "curve"
        case "a variable of no kind":
            found["templating"]["list"][0]["type"] = "databank"
        case "a panel nobody knows":
            panel["type"] = "timeserie"
    return found


@pytest.mark.parametrize(
    "name",
    [
        "a field that is not there", "a size that is a word", "a legend at the top",
        "a line that is drawn wrongly", "a variable of no kind", "a panel nobody knows",
    ],
)  # fmt: skip
def test_a_broken_one_fails(check: Path, name: str) -> None:
    code, says = verdict(check, broken(name))
    assert code == 1
    assert "dashboard.json: " in says


def queries() -> list[str]:
    found = dashboard()
    texts = [t["expr"] for p in found["panels"] for t in p.get("targets", ())]
    return texts + [a["expr"] for a in found["annotations"]["list"]]


def rules() -> dict[str, str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {r.get("record", r.get("alert")): r["expr"] for g in groups for r in g["rules"]}


def asked(texts: list[str]) -> set[str]:
    """Metrics of queries; those of recording rules are replaced by what the rule asks for."""
    known, names = rules(), set[str]()
    for text in texts:
        bare = re.sub(r'"[^"]*"', "", text)
        for name in METRIC.findall(bare):
            names |= asked([known[name]]) if name in known else {name}
    return names


def test_every_panel_has_a_query_and_a_description() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert len(panel["description"]) > 10, panel["title"]


def metric_names(scrape: str) -> set[str]:
    """Names of a scrape, those of histograms with their endings."""
    return {re.split(r"[{ ]", line)[0] for line in scrape.splitlines() if line[:1] != "#"}


def missing(scrape: str) -> set[str]:
    """Metrics that the dashboard or the rules ask for and the scrape has not."""
    return asked([*queries(), *rules().values()]) - metric_names(scrape) - ELSEWHERE
