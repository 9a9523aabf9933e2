"""The manifests are what Kubernetes takes, and name flags, ports, paths and files that the code knows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, ROOT, entry_point, parsed
from jsonschema import Draft202012Validator, ValidationError

from offramp_common.certs import pair_of
from offramp_common.revocation import FILE_NAME

FOLDER = DEPLOY / "kubernetes"
README = (FOLDER / "README.md").read_text()
VERSIONS = ("1.29.0", kubernetes_validate.latest_version())
Object = dict[str, Any]

# KubeRay's resource definitions are in no package registry: these are the names and types that the
# reference of KubeRay 1.6 gives to the fields that we use, and to their neighbours. The pods inside
# are Kubernetes' own kind, and are held against its published schema.
_ANY: Object = {"type": "object"}
_COUNT: Object = {"type": "integer", "minimum": 0}
_PARAMS: Object = {"type": "object", "additionalProperties": {"type": "string"}}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> Object:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_WORKERS = _closed(
    ("groupName", "rayStartParams", "template"),
    groupName={"type": "string"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    idleTimeoutSeconds=_COUNT,
    rayStartParams=_PARAMS,
    template=_ANY,
)
_CLUSTER = _closed(
    ("headGroupSpec",),
    rayVersion={"type": "string"},
    authOptions=_closed(mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_ANY,
    gcsFaultToleranceOptions=_ANY,
    headGroupSpec=_closed(
        ("rayStartParams", "template"),
        serviceType={"type": "string"},
        headService=_ANY,
        rayStartParams=_PARAMS,
        template=_ANY,
    ),
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
_RAY_SERVICE = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_ANY,
    spec=_closed(
        serveConfigV2={"type": "string"},
        rayClusterConfig=_CLUSTER,
        serveService=_ANY,
        excludeHeadPodFromServeSvc={"type": "boolean"},
        rayClusterDeletionDelaySeconds=_COUNT,
        upgradeStrategy=_ANY,
    ),
)


def objects() -> list[Object]:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    return [one for name in listed for one in yaml.safe_load_all((FOLDER / name).read_text())]


def the(kind: str, name: str) -> Object:
    (found,) = [o for o in objects() if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return deepcopy(found)


def pod_templates() -> dict[str, Object]:
    """Every pod of ours, by what it is."""
    cluster = the("RayService", "offramp")["spec"]["rayClusterConfig"]
    workers = {f"workers {w['groupName']}": w["template"] for w in cluster["workerGroupSpecs"]}
    gateway = the("Deployment", "offramp-gateway")["spec"]["template"]
    return {"head": cluster["headGroupSpec"]["template"], "gateway": gateway, **workers}


def containers(template: Object) -> Iterator[Object]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def gateway_container() -> Object:
    (container,) = the("Deployment", "offramp-gateway")["spec"]["template"]["spec"]["containers"]
    return deepcopy(container)


def settings() -> dict[str, str]:
    return deepcopy(the("ConfigMap", "offramp-settings")["data"])


def expanded(text: str) -> str:
    """With $(NAME) from the ConfigMap, as the kubelet does it."""
    return re.sub(r"\$\((\w+)\)", lambda match: settings()[match[1]], text)


def gateway_args() -> Namespace:
    return parsed([*entry_point("cloud"), *map(expanded, gateway_container()["args"])])


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def named_ports(container: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_of_kubernetes_own_kinds_is_valid_and_has_no_unknown_field(
    version: str,
) -> None:
    own = [each for each in objects() if each["kind"] != "RayService"]
    assert len(own) > 8
    for each in own:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pods_within_the_ray_service_are_valid(version: str) -> None:
    for template in pod_templates().values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_ray_service_has_only_fields_that_kuberay_knows() -> None:
    Draft202012Validator(_RAY_SERVICE).validate(the("RayService", "offramp"))


def test_the_checks_find_a_misspelt_field_a_wrong_type_and_a_missing_one() -> None:
    service = the("RayService", "offramp")
    cluster = service["spec"]["rayClusterConfig"]
    validator = Draft202012Validator(_RAY_SERVICE)
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # KubeRay wants strings
    with pytest.raises(ValidationError, match="0 is not of type 'string'"):
        validator.validate(service)
    del cluster["headGroupSpec"]["rayStartParams"]
    with pytest.raises(ValidationError, match="'rayStartParams' is a required property"):
        validator.validate(service)
    deployment = the("Deployment", "offramp-gateway")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_kustomize_builds_all_of_it_into_one_namespace() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the kustomization was not built")
    built = subprocess.run(
        [kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=True
    )
    made = [one for one in yaml.safe_load_all(built.stdout) if one["kind"] != "Namespace"]
    assert len(made) == len(objects()) - 1
    assert {one["metadata"]["namespace"] for one in made} == {"offramp"}
    images = set(re.findall(r"image: (\S+)", built.stdout))
    assert images == {"registry.example.com/offramp-cloud:0.1.0"}


def test_the_gateways_command_is_one_that_the_command_line_takes() -> None:
    args = gateway_args()
    # A gateway before applications that run already; TLS, and a certificate of each device.
    assert args.attach == [settings()["BUNDLE"]]
    assert args.address == settings()["RAY_HEAD"]
    assert args.tls_dir is not None
    assert not args.anonymous
    assert not args.insecure


def test_each_port_of_the_gateway_is_the_same_everywhere() -> None:
    args, container = gateway_args(), gateway_container()
    ports = named_ports(container)
    assert ports["grpc"] == port_of(args.listen)
    assert ports["health"] == port_of(args.health)
    assert ports["metrics"] == port_of(args.metrics)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    (service,) = the("Service", "offramp-gateway")["spec"]["ports"]
    assert service["targetPort"] in ports
    assert service["port"] == ports["grpc"]
    annotations = pod_templates()["gateway"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    devices, prometheus = the("NetworkPolicy", "offramp-devices")["spec"]["ingress"]
    assert "from" not in devices
    assert [port["port"] for port in devices["ports"]] == [ports["grpc"]]
    assert [port["port"] for port in prometheus["ports"]] == [ports["metrics"]]
    exposed = re.search(r"^EXPOSE (\d+)", (DEPLOY / "Dockerfile.cloud").read_text(), re.MULTILINE)
    assert exposed is not None
    assert int(exposed[1]) == ports["grpc"]


def test_all_files_that_are_named_lie_in_a_volume_that_is_mounted() -> None:
    for what, template in pod_templates().items():
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in containers(template):
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts.keys() <= volumes, what
    mounts = {mount["name"]: mount["mountPath"] for mount in gateway_container()["volumeMounts"]}
    assert str(gateway_args().tls_dir) == mounts["certs"]
    for application in serve_config()["applications"]:
        for what, template in pod_templates().items():
            if what.startswith("workers"):
                (container,) = template["spec"]["containers"]
                paths = [mount["mountPath"] for mount in container["volumeMounts"]]
                bundle = Path(application["args"]["bundle"])
                assert str(bundle.parent) in paths


def test_every_secret_that_is_asked_for_is_made_by_the_readmes_commands() -> None:
    text = json.dumps(objects())
    asked = set(re.findall(r'"secretName": "([\w-]+)"', text))
    asked |= set(re.findall(r'"secretKeyRef": \{"name": "([\w-]+)"', text))
    assert asked == {"offramp-ray", "offramp-tls"}
    made = dict(re.findall(r"create secret generic (\S+) (.*?)(?=\n\n)", README, re.DOTALL))
    assert made.keys() == asked
    # KubeRay reads this key, and the gateways do.
    assert "--from-literal=auth_token=" in made["offramp-ray"]
    assert '"key": "auth_token"' in text
    tls = {"ca.pem", FILE_NAME, *(path.name for path in pair_of("certs", "server"))}
    assert set(re.findall(r"--from-file=certs/(\S+)", made["offramp-tls"])) == tls
    assert "ca.key" not in made["offramp-tls"], "who has it can make devices"


def test_no_secret_lies_in_the_manifests() -> None:
    assert not [each for each in objects() if each["kind"] == "Secret"]


def test_every_pod_is_what_the_restricted_standard_asks_for_and_more() -> None:
    user = re.search(r"^USER (\d+)", (DEPLOY / "Dockerfile.cloud").read_text(), re.MULTILINE)
    assert user is not None
    for what, template in pod_templates().items():
        spec = template["spec"]
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"], what
        assert pod["runAsUser"] == int(user[1])
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in containers(template):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            # Ray and Python write below these, and find a home there.
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert writable == {"/tmp", "/dev/shm"}
            assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_a_gateway_has_the_time_to_drain() -> None:
    grace_s = pod_templates()["gateway"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= gateway_args().drain_s + 20
    cluster = the("RayService", "offramp")["spec"]["rayClusterConfig"]
    for workers in cluster["workerGroupSpecs"]:
        assert workers["template"]["spec"]["terminationGracePeriodSeconds"] >= grace_s


def test_budgets_scaler_and_services_select_pods_that_there_are() -> None:
    labels = {what: t["metadata"]["labels"] for what, t in pod_templates().items()}
    for kind, name, pod in (
        ("PodDisruptionBudget", "offramp-gateway", "gateway"),
        ("PodDisruptionBudget", "offramp-replicas", "workers replicas"),
        ("Deployment", "offramp-gateway", "gateway"),
    ):
        assert the(kind, name)["spec"]["selector"]["matchLabels"] == labels[pod]
    assert the("Service", "offramp-gateway")["spec"]["selector"] == labels["gateway"]
    scaler = the("HorizontalPodAutoscaler", "offramp-gateway")["spec"]
    target, deployment = scaler["scaleTargetRef"], the("Deployment", "offramp-gateway")
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "a second hand on the number of gateways"
    assert (
        scaler["minReplicas"]
        > the("PodDisruptionBudget", "offramp-gateway")["spec"]["minAvailable"]
    )
    measured = {metric["containerResource"]["container"] for metric in scaler["metrics"]}
    assert measured == {gateway_container()["name"]}
    for policy in ("offramp-devices", "offramp-ray"):
        chosen = the("NetworkPolicy", policy)["spec"]["podSelector"]["matchLabels"]
        assert any(chosen.items() <= each.items() for each in labels.values())


def serve_config() -> Object:
    config: Object = yaml.safe_load(the("RayService", "offramp")["spec"]["serveConfigV2"])
    return config


def test_the_ray_service_runs_what_serve_yaml_says() -> None:
    alone = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    assert serve_config()["applications"] == alone["applications"]
    bundles = [Path(app["args"]["bundle"]).name for app in alone["applications"]]
    assert bundles == [settings()["BUNDLE"]]


def test_serve_takes_the_configuration_and_the_application_can_be_built() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="pip install 'offramp[cloud]'")
    schema.ServeDeploySchema.model_validate(serve_config())
    for application in serve_config()["applications"]:
        module, _, function = application["import_path"].partition(":")
        assert module == "offramp_cloud.app"
        from offramp_cloud import app

        getattr(app, function)(application["args"])


def test_ray_start_knows_the_flags_that_it_is_given() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="pip install 'offramp[cloud]'")
    known = {name for param in scripts.start.params for name in param.opts}
    (node,) = the("Deployment", "offramp-gateway")["spec"]["template"]["spec"]["initContainers"]
    assert node["command"] == ["ray", "start"]
    assert node["restartPolicy"] == "Always", "a sidecar, not a step"
    assert {flag.partition("=")[0] for flag in node["args"]} <= known
    cluster = the("RayService", "offramp")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_ray_is_the_version_that_the_image_holds() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert the("RayService", "offramp")["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_worker_pods_have_a_cpu_for_every_thread_of_every_replica() -> None:
    cluster = the("RayService", "offramp")["spec"]["rayClusterConfig"]
    cpus = sum(
        w["replicas"] * float(c["resources"]["limits"]["cpu"])
        for w in cluster["workerGroupSpecs"]
        for c in w["template"]["spec"]["containers"]
    )
    asked = sum(
        app["args"]["replicas"] * app["args"]["threads"] for app in serve_config()["applications"]
    )
    assert cpus >= asked
