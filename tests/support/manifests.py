"""Manifests of Kubernetes, and a check against schemas of custom resources that may lie elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

KUBERAY = Path(__file__).resolve().parents[2] / "deploy" / "kuberay"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / name).read_text())


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """The spec of the cluster that a custom resource of KubeRay makes."""
    spec = resource["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[resource["kind"]]


def groups(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Head and worker groups by name."""
    cluster = cluster_of(resource)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def problems(resource: dict[str, Any], crd: dict[str, Any]) -> list[str]:
    """Where a resource breaks its definition: wrong values, and fields that are not there, which the API server would drop unsaid."""
    (version,) = (v for v in crd["spec"]["versions"] if resource["apiVersion"] == f"{crd['spec']['group']}/{v['name']}")
    schema = version["schema"]["openAPIV3Schema"]
    wrong = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(_plain(schema)).iter_errors(resource)]
    return wrong + list(_unknown(resource, schema, "$"))


def _plain(schema: Any) -> Any:
    """Without what is Kubernetes' own: a value that may be a number or text."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _plain(value) for key, value in schema.items() if not (key == "type" and schema.get("x-kubernetes-int-or-string"))}


def _unknown(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, part in enumerate(value):
            yield from _unknown(part, schema.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, dict) and not schema.get("x-kubernetes-preserve-unknown-fields") and where != "$.metadata":
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, part in value.items():
            if key in known or others:
                yield from _unknown(part, known.get(key) or (others if isinstance(others, dict) else {}), f"{where}.{key}")
            else:
                yield f"{where}.{key}: there is no such field"
