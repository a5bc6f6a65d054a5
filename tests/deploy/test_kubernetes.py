"""The Kubernetes manifests against the API's schemas, overlays included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.31"
Object = dict[str, Any]


def merge(into: Any, patch: Any) -> Any:
    """A strategic merge as far as the overlays need it: lists of named things by their names.

    Other lists are replaced. kustomize itself is not needed to run these tests.
    """
    if isinstance(into, dict) and isinstance(patch, dict):
        keys = [*into, *(k for k in patch if k not in into)]
        return {k: merge(into[k], patch[k]) if k in into and k in patch
                else patch.get(k, into.get(k)) for k in keys}  # fmt: skip
    named = isinstance(into, list) and all(isinstance(x, dict) and "name" in x for x in into)
    if (
        named
        and isinstance(patch, list)
        and all(isinstance(x, dict) and "name" in x for x in patch)
    ):
        found = {x["name"]: x for x in into}
        for x in patch:
            found[x["name"]] = merge(found[x["name"]], x) if x["name"] in found else x
        return list(found.values())
    return patch


def are_named(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(y, dict) and "name" in y for y in x)


def read(file: Path) -> list[Object]:
    return [x for x in yaml.safe_load_all(file.read_text(encoding="utf-8")) if x]


def build(folder: Path) -> list[Object]:
    """What `kubectl kustomize` would print, for what our kustomizations use."""
    (plan,) = read(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "components", "images", "patches"}
    assert set(plan) <= known
    objects: list[Object] = []
    for name in plan.get("resources", ()):
        path = folder / name
        objects += build(path) if path.is_dir() else read(path)
    for name in plan.get("components", ()):
        objects += build(folder / name)
    for entry in plan.get("patches", ()):
        (patch,) = read(folder / entry["path"])
        (place,) = [
            i for i, x in enumerate(objects)
            if (x["kind"], x["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"])
        ]  # fmt: skip
        objects[place] = merge(objects[place], patch)
    for image in plan.get("images", ()):
        for x in objects:
            for container in pods(x):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def pods(x: Object) -> list[Object]:
    found: list[Object] = x["spec"]["template"]["spec"]["containers"] if is_deployment(x) else []
    return found


def is_deployment(x: Object) -> bool:
    return bool(x["kind"] == "Deployment")


@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_an_overlay_is_valid(overlay: str) -> None:
    objects = build(FOLDER / overlay)
    kinds = {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "PersistentVolumeClaim"}
    assert {x["kind"] for x in objects} == kinds
    for x in objects:
        kubernetes_validate.validate(x, VERSION, strict=True)
    (deployment,) = filter(is_deployment, objects)
    (server,) = pods(deployment)
    assert server["image"] == f"kvthrift:0.1.0-{overlay}"
    assert "--cache-policy=$(CACHE_POLICY)" in server["args"]
    on_gpu = {"--cache-kernel=triton", "--block-size=128"}
    assert on_gpu & set(server["args"]) == (on_gpu if overlay == "cuda" else set())
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (overlay == "cuda")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for x in objects:
        selector = x.get("spec", {}).get("selector", labels)
        assert selector.get("matchLabels", selector) == labels, x["kind"]
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > 30 + 5  # draining, and the wait before it


def test_mistakes_are_found() -> None:
    (deployment,) = filter(is_deployment, build(FOLDER / "cpu"))
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)
    wrong = copy.deepcopy(deployment)
    del wrong["spec"]["selector"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_components_are_of_the_operators_kinds() -> None:
    (monitor,) = build(FOLDER / "components" / "monitoring")
    (scaled,) = build(FOLDER / "components" / "autoscaling")
    (service,) = [x for x in build(FOLDER / "base") if x["kind"] == "Service"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == "kvthrift"
    assert "vllm:num_requests_waiting" in scaled["spec"]["triggers"][0]["metadata"]["query"]
