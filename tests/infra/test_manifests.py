"""The manifests are accepted by KubeRay 1.7's own schemas, and agree with each other and with the code."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import PREFIX, Settings, load

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
MANIFESTS = sorted((INFRA / "kubernetes").glob("*.yaml"))
VALIDATOR = ROOT.parent / "shared" / "k8s" / "validate_manifests.py"

SECRETS = {
    "peft-service-database": {"url"},
    "peft-service-store": {"access_key_id", "secret_access_key", "endpoint_url"},
    "peft-service-ray-token": {"auth_token"},
    "peft-training-ray-token": {"auth_token"},
}
"""Name and keys of every secret that the README tells the administrator to make."""


def objects(*, but: str = "training-cpu.yaml") -> list[dict[str, Any]]:
    """One installation: `training-cpu.yaml` and `training-gpu.yaml` are two forms of one object."""
    return [
        document
        for path in MANIFESTS
        if path.name != but
        for document in yaml.safe_load_all(path.read_text())
    ]


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pod templates in it, with the labels that KubeRay adds."""
    spec = document.get("spec", {})
    if document["kind"] == "Job":
        yield document["metadata"]["name"], spec["template"]
    if document["kind"] in {"RayService", "RayCluster"}:
        cluster = spec.get("rayClusterConfig", spec)
        groups = [("head", cluster["headGroupSpec"])]
        groups += [("worker", group) for group in cluster["workerGroupSpecs"]]
        for node_type, group in groups:
            template = group["template"]
            labels = {**template["metadata"]["labels"], "ray.io/node-type": node_type}
            name = f"{document['metadata']['name']}/{group.get('groupName', 'head')}"
            yield name, {**template, "metadata": {**template["metadata"], "labels": labels}}


PODS = {
    f"{path.stem}:{name}": pod
    for path in MANIFESTS
    for document in yaml.safe_load_all(path.read_text())
    for name, pod in pods(document)
}
every_pod = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


def selected(selector: dict[str, Any]) -> list[str]:
    wanted = selector.get("matchLabels", {}).items()
    return [name for name, pod in PODS.items() if wanted <= pod["metadata"]["labels"].items()]


def test_kuberay_and_kubernetes_accept_every_manifest() -> None:
    if not VALIDATOR.exists():
        pytest.skip("the KubeRay schemas lie in ../shared/k8s, which is not there")
    schemas = VALIDATOR.parent
    command = [sys.executable, str(VALIDATOR), "--crd-dir", str(schemas / "kuberay-crds")]
    command += ["--schema-dir", str(schemas / "crd-schemas"), "--k8s", "1.34", *map(str, MANIFESTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"{sum(1 for path in MANIFESTS for _ in yaml.safe_load_all(path.read_text()))} objects" in done.stdout
    )


def test_everything_is_in_the_one_namespace() -> None:
    (namespace,) = [o["metadata"]["name"] for o in objects() if o["kind"] == "Namespace"]
    assert {o["metadata"]["namespace"] for o in objects() if o["kind"] != "Namespace"} == {namespace}


@every_pod
def test_a_pod_runs_unprivileged_with_requests_equal_to_limits(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


@every_pod
def test_service_links_are_off(pod: dict[str, Any]) -> None:
    """The Service `peft-service-serve-svc` would give pods PEFT_SERVICE_SERVE_SVC_…, unknown to settings."""
    assert pod["spec"]["enableServiceLinks"] is False


@every_pod
def test_every_setting_of_a_pod_exists(pod: dict[str, Any]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for container in pod["spec"]["containers"]:
        names = [entry["name"] for entry in container["env"]]
        assert len(names) == len(set(names))
        assert {name for name in names if name.startswith(PREFIX)} <= known


def test_the_plain_values_are_settings_that_load() -> None:
    (head,) = [pod for name, pod in PODS.items() if name == "control-plane:peft-service/head"]
    values = {
        entry["name"]: entry["value"] for entry in head["spec"]["containers"][0]["env"] if "value" in entry
    }
    settings = load(values | {"PEFT_SERVICE_DATABASE_URL": "postgresql+psycopg://u:p@host/db"})
    assert settings.train_ray_address == "http://peft-training-head-svc:8265"
    assert str(settings.train_ray_auth_token_path) == "/etc/peft-training/auth_token"


@every_pod
def test_secrets_are_references_to_documented_secrets(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    references = [
        (entry["valueFrom"]["secretKeyRef"]["name"], entry["valueFrom"]["secretKeyRef"]["key"])
        for container in spec["containers"]
        for entry in container["env"]
        if "valueFrom" in entry
    ]
    for volume in spec["volumes"]:
        if "secret" in volume:
            references += [
                (volume["secret"]["secretName"], item["key"]) for item in volume["secret"]["items"]
            ]
    assert references
    for name, key in references:
        assert key in SECRETS[name]
    for container in spec["containers"]:
        for entry in container["env"]:
            if re.search(r"SECRET|PASSWORD|DATABASE_URL|ACCESS_KEY", entry["name"]):
                assert "valueFrom" in entry, f"{entry['name']} is written out"


@every_pod
def test_every_mount_has_its_volume(pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_no_secret_is_in_the_files_and_the_readme_makes_them_all() -> None:
    assert not [o for o in objects() if o["kind"] == "Secret"]
    readme = (INFRA / "README.md").read_text()
    for name, keys in SECRETS.items():
        assert f"create secret generic {name}" in readme
        for key in keys:
            assert f"={key}" in readme or f"{key}=" in readme, f"{name}: {key}"


def test_the_database_is_known_to_the_control_plane_only() -> None:
    for name, pod in PODS.items():
        names = {entry["name"] for c in pod["spec"]["containers"] for entry in c["env"]}
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        assert (PREFIX + "DATABASE_URL" in names) == (component in {"control-plane", "migrate"}), name
    policies = {o["metadata"]["name"]: o["spec"] for o in objects() if o["kind"] == "NetworkPolicy"}

    def ports(name: str) -> set[int]:
        return {port["port"] for rule in policies[name]["egress"] for port in rule.get("ports", [])}

    assert 5432 in ports("control-plane") & ports("migrate")
    assert 5432 not in ports("training")


def test_every_selector_finds_the_pods_it_is_meant_for() -> None:
    for document in objects():
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
        if kind in {"PodDisruptionBudget", "PodMonitor"}:
            assert selected(spec["selector"]), f"{kind}/{name} selects nothing"
        if kind == "NetworkPolicy":
            assert selected(spec["podSelector"]), f"{kind}/{name} selects nothing"
            for rule in spec.get("ingress", []) + spec.get("egress", []):
                for peer in rule.get("from", []) + rule.get("to", []):
                    if "podSelector" in peer:
                        assert selected(peer["podSelector"]), f"{kind}/{name} has a peer that does not exist"


def test_a_budget_is_an_integer_and_never_more_than_there_are_pods() -> None:
    budgets = [o["spec"] for o in objects() if o["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        assert type(budget["minAvailable"]) is int
        assert "maxUnavailable" not in budget


def test_every_scraped_port_is_declared_by_every_pod_it_is_scraped_from() -> None:
    monitors = [o["spec"] for o in objects() if o["kind"] == "PodMonitor"]
    assert monitors
    for monitor in monitors:
        for name in selected(monitor["selector"]):
            declared = {port["name"] for c in PODS[name]["spec"]["containers"] for port in c.get("ports", [])}
            assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= declared, name


def test_the_control_plane_has_no_gpu_and_reaches_the_training_cluster_by_its_service() -> None:
    by_kind = {o["kind"]: o for o in objects()}
    service, cluster = by_kind["RayService"], by_kind["RayCluster"]
    text = yaml.safe_dump(service)
    assert "nvidia.com/gpu" not in text
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in text
    assert service["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    assert (
        service["spec"]["rayClusterConfig"]["authOptions"]["secretName"]
        != cluster["spec"]["authOptions"]["secretName"]
    ), "a run must not hold the token of the cluster that knows the database"


def test_gpu_and_cpu_training_are_two_forms_of_one_object() -> None:
    forms = [
        next(o for o in objects(but=other) if o["kind"] == "RayCluster")
        for other in ("training-cpu.yaml", "training-gpu.yaml")
    ]
    assert forms[0]["metadata"]["name"] == forms[1]["metadata"]["name"]
    gpus = ["nvidia.com/gpu" in yaml.safe_dump(form["spec"]["workerGroupSpecs"]) for form in forms]
    assert gpus == [True, False]


def test_replicas_of_the_api_are_as_many_as_pods_for_them() -> None:
    service = next(o for o in objects() if o["kind"] == "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    env = group["template"]["spec"]["containers"][0]["env"]
    assert {"name": "PEFT_SERVICE_API_REPLICAS", "value": str(group["replicas"])} in env


def test_the_serve_config_is_the_one_that_our_code_makes_for_these_settings() -> None:
    from jobs import serve

    service = next(o for o in objects() if o["kind"] == "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    env = {entry["name"]: entry.get("value") for entry in group["template"]["spec"]["containers"][0]["env"]}
    settings = load({"PEFT_SERVICE_API_REPLICAS": env["PEFT_SERVICE_API_REPLICAS"]})
    written = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert written == serve.config(settings)
    (application,) = written["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_one_ray_version_everywhere() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    dockerfile = (INFRA / "images" / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={pinned[1]}\n" in dockerfile
    for document in objects():
        if document["kind"] in {"RayService", "RayCluster"}:
            spec = document["spec"]
            assert spec.get("rayClusterConfig", spec)["rayVersion"] == pinned[1]


def test_the_image_copies_what_the_build_context_lets_through_and_all_our_packages() -> None:
    dockerfile = (INFRA / "images" / "Dockerfile").read_text()
    context = (INFRA / "images" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in context if line.startswith("!")}
    copied = {
        word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    }
    assert copied == allowed
    assert {"peft_service", "cluster", "jobs"} <= copied
    assert all((ROOT / path).exists() for path in copied)
    assert re.search(r"^USER 1000:100$", dockerfile, re.MULTILINE)
    assert "bash wget" in dockerfile, "KubeRay's readiness probe of RayService workers runs both"


def test_every_image_is_one_that_the_dockerfile_builds() -> None:
    dockerfile = (INFRA / "images" / "Dockerfile").read_text()
    for pod in PODS.values():
        for container in pod["spec"]["containers"]:
            assert container["image"].removeprefix("registry.example.com/") in dockerfile
