"""The compose file: everything pinned, nothing open that was not asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

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
