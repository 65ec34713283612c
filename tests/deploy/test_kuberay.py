"""The manifests of deploy/kuberay: Kubernetes' own schemas, KubeRay's where they are at hand, and what has to agree between them."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import KUBERAY, cluster_of, container, groups, manifest, problems
from running import ROOT

from jobs.config import build
from jobs.schemas import GsilConfig
from pipelines.serving import models
from pipelines.serving.settings import ServiceConfig

RAY = ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml")
KUBERNETES = "1.31"
"""Its schemas stand in for those of every later version: nothing that is used here has changed."""
IN_IMAGE = "/opt/gsil"
SHARED = "/shared"

# The fields that are used, in API version v1 of KubeRay 1.7: a slip of the pen is found where its definitions are not at hand.
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
FIELDS = {
    "RayCluster": CLUSTER,
    "RayJob": {
        *("entrypoint", "submissionMode", "backoffLimit", "submitterConfig", "activeDeadlineSeconds"),
        *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
    },
    "RayService": {"serveConfigV2", "excludeHeadPodFromServeSvc", "rayClusterDeletionDelaySeconds", "rayClusterConfig"},
}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.mark.parametrize("name", RAY)
def test_manifests_fit_kuberays_definitions(name: str) -> None:
    folder = os.environ.get("GSIL_KUBERAY_CRDS")
    if not folder:
        pytest.skip("GSIL_KUBERAY_CRDS names no folder with KubeRay's definitions (helm-chart/kuberay-operator/crds of its repository)")
    resource = manifest(name)
    (crd,) = (yaml.safe_load(path.read_text()) for path in Path(folder).glob(f"*{resource['kind'].lower()}s.yaml"))
    assert problems(resource, crd) == []


def test_a_wrong_field_or_value_is_found_in_a_definition() -> None:
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"replicas": {"type": "integer"}}}}}
    crd = {"spec": {"group": "ray.io", "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    resource = {"apiVersion": "ray.io/v1", "spec": {"replicas": "1", "replica": 1}}
    found = problems(resource, crd)
    assert found[0].startswith("$.spec.replicas: '1' is not of type 'integer'")
    assert found[1:] == ["$.apiVersion: there is no such field", "$.spec.replica: there is no such field"]


def test_a_run_of_its_own_and_a_cluster_that_stays_are_the_same_cluster() -> None:
    assert cluster_of(manifest("rayjob.yaml")) == cluster_of(manifest("raycluster.yaml"))


@pytest.mark.parametrize("name", RAY)
def test_fields_of_kuberay_are_spelt_right(name: str) -> None:
    resource = manifest(name)
    assert resource["apiVersion"] == "ray.io/v1" and set(resource["spec"]) <= FIELDS[resource["kind"]]
    assert set(cluster_of(resource)) <= CLUSTER
    for group in cluster_of(resource)["workerGroupSpecs"]:
        assert set(group) == WORKERS


@pytest.mark.parametrize("name", ["storage.yaml", "secret.yaml"])
def test_storage_and_secret_are_kubernetes_own(name: str) -> None:
    kubernetes_validate.validate(manifest(name), KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY)
def test_every_pod_is_one_that_kubernetes_takes(name: str) -> None:
    for group in groups(manifest(name)).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY)
def test_pods_agree_on_storage_secrets_and_images(name: str) -> None:
    claim, keys = manifest("storage.yaml")["metadata"]["name"], manifest("secret.yaml")
    assert manifest("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]
    # The operator names the secret of a cluster's own token after the cluster.
    assert keys["metadata"]["name"] != manifest(name)["metadata"]["name"]
    for group_name, group in groups(manifest(name)).items():
        spec, only = group["template"]["spec"], container(group)
        assert {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]} == {"shared": claim}
        assert only["volumeMounts"] == [{"name": "shared", "mountPath": SHARED}]
        wanted = [entry["valueFrom"]["secretKeyRef"] for entry in only["env"] if "valueFrom" in entry]
        assert wanted and all(key["name"] == keys["metadata"]["name"] and key["key"] in keys["stringData"] for key in wanted)
        assert only["image"] == f"your-registry/gsil:{'gpu' if group_name == 'gpu' else 'cpu'}"
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        assert not only["securityContext"]["allowPrivilegeEscalation"]


@pytest.mark.parametrize("name", RAY)
def test_the_head_works_not_and_workers_come_as_they_are_needed(name: str) -> None:
    import ray

    resource = manifest(name)
    cluster = cluster_of(resource)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["idleTimeoutSeconds"] >= 300
    assert cluster["authOptions"] == {"mode": "token"}
    found = groups(resource)
    assert found["head"]["rayStartParams"]["num-cpus"] == "0"
    for group_name, group in found.items():
        asked, limits = (container(group)["resources"][kind] for kind in ("requests", "limits"))
        # A pod is ended above its limit of memory, and Ray reads what a worker has from both.
        assert asked["memory"] == limits["memory"] and int(asked["cpu"]) >= 1
        assert (asked.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")) and (("nvidia.com/gpu" in limits) == (group_name == "gpu"))
        if group_name != "head":
            assert group["minReplicas"] == group["replicas"] == (1 if resource["kind"] == "RayService" else 0)
            assert group["maxReplicas"] > group["minReplicas"]


@pytest.mark.parametrize("name", RAY)
def test_probes_ask_paths_that_ray_answers_without_a_token(name: str) -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group_name, group in groups(manifest(name)).items():
        only = container(group)
        probes = [only["livenessProbe"], only["readinessProbe"]]
        served = [probe for probe in probes if "exec" in probe]
        assert len(served) == (name == "rayservice.yaml" and group_name == "gpu")
        asked = [(probe["httpGet"]["port"], probe["httpGet"]["path"]) for probe in probes if "httpGet" in probe]
        for probe in served:
            text = probe["exec"]["command"][-1]
            urls = re.findall(r"http://localhost:(\d+)(/\S*)", text)
            asked += [(int(port), path) for port, path in urls if path != "/-/healthz"]
            assert ("8000", "/-/healthz") in urls
        assert asked and all(port == 52365 and path in PUBLIC_EXACT_PATHS for port, path in asked)


def test_the_jobs_entrypoint_is_a_run_of_ours_on_the_shared_volume() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["submissionMode"] == "K8sJobMode"
    python, script, *flags = shlex.split(spec["entrypoint"].replace(IN_IMAGE, str(ROOT)))
    assert python == "python" and Path(script) == ROOT / "jobs" / "gsil_iterative.py" and Path(script).is_file()
    config = build(GsilConfig, flags)
    assert config.run.root.startswith(f"{SHARED}/")
    # Every worker and every engine finds room in a pod of the group.
    asked = container(groups(manifest("rayjob.yaml"))["gpu"])["resources"]["requests"]
    assert 8 * config.training.cpus_per_worker <= int(asked["cpu"]) and config.training.gpus_per_worker * 8 <= int(asked["nvidia.com/gpu"])
    assert config.engine.num_gpus <= int(asked["nvidia.com/gpu"])


def test_the_service_is_an_application_of_ours() -> None:
    from ray.serve.schema import ServeDeploySchema

    resource = manifest("rayservice.yaml")
    text = resource["spec"]["serveConfigV2"]
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = deployed.applications
    config = ServiceConfig.model_validate(application.args)
    generated: dict[str, Any] = yaml.safe_load(models.serve_config(config))
    written = yaml.safe_load(text)
    assert written["http_options"] == generated["http_options"] and written["proxy_location"] == generated["proxy_location"]
    for key in ("name", "route_prefix", "import_path"):
        assert written["applications"][0][key] == generated["applications"][0][key]
    assert config.policy.path and config.policy.path.startswith(f"{SHARED}/")
    for group in groups(resource).values():
        only = container(group)
        values = {entry["name"]: entry.get("value") for entry in only["env"]}
        assert values.items() >= models.environment(config).items() and config.server.api_keys_env in values
        assert {"name": "serve", "containerPort": config.server.port} in only["ports"]
    gpu = groups(resource)["gpu"]
    assert config.policy.num_gpus <= int(container(gpu)["resources"]["limits"]["nvidia.com/gpu"])
    assert config.policy.max_actors <= gpu["maxReplicas"]
    assert gpu["template"]["spec"]["terminationGracePeriodSeconds"] > config.server.request_timeout
    assert resource["spec"]["rayClusterDeletionDelaySeconds"] >= config.server.request_timeout


def test_no_secret_is_filled_in() -> None:
    assert set(manifest("secret.yaml")["stringData"].values()) == {"CHANGE-ME"}
    assert sorted(path.name for path in KUBERAY.iterdir()) == sorted(("secret.yaml", "storage.yaml", *RAY))
