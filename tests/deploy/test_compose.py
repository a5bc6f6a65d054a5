"""The compose file: everything pinned, nothing open that was not asked for."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from dotenv import dotenv_values

from server.container import VARIABLE, words

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
OPTION = re.compile(r"\$\{([A-Z_0-9]+):-")


def test_the_image_has_the_torch_of_the_set_up() -> None:
    pin = re.compile(r'torch="(torch==[^"]+)"')
    texts = [(DEPLOY.parent / f).read_text() for f in ("Dockerfile", "scripts/setup.sh")]
    assert len({pin.findall(text)[0] for text in texts}) == 1


def test_the_usual_services_need_no_profile() -> None:
    usual = {name for name, s in SERVICES.items() if "profiles" not in s}
    assert usual == {"server", "prometheus", "grafana"}


def test_images_are_pinned_and_ports_on_loopback() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2] if "$" not in service["image"] else "0.1.0"
        assert re.match(r"v?\d+\.\d+\.\d+", tag), name
        for port in service.get("ports", ()):
            assert port.startswith("${BIND:-127.0.0.1}:"), name


def test_no_container_has_more_rights_than_it_needs() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert name == "grafana" or service["read_only"], name


def test_no_service_restarts_for_ever() -> None:
    for name, service in SERVICES.items():
        assert re.fullmatch(r"on-failure:[1-5]|no", service["restart"]), name


def test_every_setting_is_in_the_example_with_its_default() -> None:
    example = (DEPLOY / ".env.example").read_text(encoding="utf-8")
    given = dict(re.findall(r"^([A-Z_0-9]+)=(.*)$", example, re.MULTILINE))
    hidden = {"PIP_FIND_LINKS", "KVTHRIFT_ROUTER_TAG"}
    assert set(OPTION.findall(COMPOSE)) - hidden == set(given)
    for name, default in re.findall(r"\$\{([A-Z_0-9]+):-([^}]*)\}", COMPOSE):
        if name not in hidden:
            assert given[name] == default, name


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("--policy-alias fast='snapkv(budget=512)'", ["--policy-alias", "fast=snapkv(budget=512)"]),
        (
            """--prompt-compression '{"method": "selective", "rate": 0.5}' --enforce-eager""",
            ["--prompt-compression", '{"method": "selective", "rate": 0.5}', "--enforce-eager"],
        ),
        ("""'--chat-template="x y"'""", ["--chat-template=x y"]),
        ("--policy snapkv(budget=512)+kivi-4bit", ["--policy", "snapkv(budget=512)+kivi-4bit"]),
        ("--x $HOME;`id` *", ["--x", "$HOME;`id`", "*"]),
        ("", []),
    ],
)
def test_flags_in_the_settings_keep_their_quotes_together(
    tmp_path: Path, line: str, found: list[str]
) -> None:
    file = tmp_path / ".env"
    file.write_text(f"SERVER_ARGS={line}\n")  # python-dotenv is what podman-compose reads it with
    text = dotenv_values(file, interpolate=False)["SERVER_ARGS"] or ""
    assert words(text) == found


def test_a_quote_that_is_not_closed_is_named() -> None:
    with pytest.raises(SystemExit, match="ARGUMENTS: No closing quotation: --x 'a"):
        words("--x 'a")


def test_what_containers_run_is_the_command_with_the_settings_behind_it() -> None:
    for name in ("server", "loadtest", "compare", "canary", "replica-1", "replica-2"):
        service = SERVICES[name]
        assert VARIABLE in service["environment"], name
        tini, dashes, python, *more = service["entrypoint"]
        assert (tini, dashes, python) == ("tini", "--", "python3.11")
    done = subprocess.run(
        [sys.executable, *more, "policies"],
        env={**os.environ, VARIABLE: "--memory '4 G'"},
        capture_output=True, text=True, check=False, cwd=DEPLOY.parent,
    )  # fmt: skip
    assert (done.returncode, "memory '4 G' is not a whole number" in done.stderr) == (2, True)


def test_load_test_and_canary_can_be_found_by_prometheus() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for name in ("loadtest", "canary"):
        (job,) = (j for j in scrape["scrape_configs"] if j["job_name"] == name)
        (found,) = job["dns_sd_configs"]
        assert found["names"] == [name]
        assert f"--serve-metrics=0.0.0.0:{found['port']}" in SERVICES[name]["command"]
    texts = [DEPLOY / "compose.yaml", DEPLOY.parent / "README.md"]
    texts += (DEPLOY.parent / "docs").glob("*.md")
    commands = [
        line
        for path in texts
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"profile loadtest run\b", line)
    ]
    assert len(commands) >= 3
    for line in commands:  # without it Docker gives a container of `run` no name of its service
        assert "run --rm --use-aliases loadtest" in line, line


def test_the_health_check_goes_by_no_proxy() -> None:
    text = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r'CMD \["python3.11", "-c", "(.*)"\]', text)
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    with running_answer() as port:
        done = subprocess.run(
            [sys.executable, "-c", command.replace(":8000", f":{port}")],
            env={**os.environ, **proxy, "NO_PROXY": "", "no_proxy": ""}, check=False,
        )  # fmt: skip
    assert done.returncode == 0


@contextlib.contextmanager
def running_answer() -> Iterator[int]:
    """A server that says 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
