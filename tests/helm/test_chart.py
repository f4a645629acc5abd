"""The chart, rendered by the real helm: valid for Kubernetes, hardened, and refusing values that mean nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import SSLConnection

from app.main import create_app
from app.settings import Settings, variable
from serving.online.redis_link import connect
from tests.tools import require_module
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "streamrec"
EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}  # their schemas are not Kubernetes' own
Objects = dict[str, dict[str, Any]]


def run(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=DEADLINE)


def render(helm: Path, *arguments: str) -> Objects:
    """The chart's objects by kind; those that are not the service's own by kind and name, as in Service redis."""
    done = run(helm, "template", "shop", str(CHART), "--namespace", "shop", *arguments)
    assert done.returncode == 0, done.stderr
    objects: Objects = {}
    for found in yaml.safe_load_all(done.stdout):
        if found:
            key = f"{found['kind']} {found['metadata']['name'].removeprefix('shop-streamrec').lstrip('-')}".strip()
            assert objects.setdefault(key, found) is found, f"two objects are {key}"
    return objects


def example(helm: Path, name: str, *arguments: str) -> Objects:
    return render(helm, "--values", str(CHART / "ci" / f"{name}.yaml"), *arguments)


def pod(objects: Objects) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_lint_has_nothing_to_say(helm: Path, values: Path | None) -> None:
    done = run(helm, "lint", "--strict", str(CHART), *(["--values", str(values)] if values else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", ["1.25.0", "1.37.0"])
@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_every_object_is_valid_for_kubernetes(helm: Path, version: str, values: Path | None) -> None:
    kubernetes_validate = require_module("kubernetes_validate", "the chart's objects are")
    objects = render(helm, "--kube-version", version, *(["--values", str(values)] if values else []))
    assert {"ConfigMap", "Deployment", "Service"} <= objects.keys()
    for found in objects.values():
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, version.removesuffix(".0"), strict=True)


def test_the_examples_use_everything(helm: Path) -> None:
    kinds = {key for path in EXAMPLES for key in render(helm, "--values", str(path))}
    assert kinds == {
        "ConfigMap", "ConfigMap dashboard", "Deployment", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy",
        "NetworkPolicy redis", "PodDisruptionBudget", "PrometheusRule", "ScaledObject", "Secret", "Service",
        "Service redis", "ServiceMonitor", "StatefulSet redis",
    }  # fmt: skip


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_the_service_reads_every_setting(helm: Path, values: Path) -> None:
    known = {variable(name) for name in Settings.model_fields}
    objects = render(helm, "--values", str(values))
    given = [*objects["ConfigMap"]["data"], *objects.get("Secret", {"stringData": {}})["stringData"]]
    assert set(given) <= known
    assert len(given) == len(set(given))


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_every_pod_is_hardened(helm: Path, values: Path) -> None:
    found = [one for one in render(helm, "--values", str(values)).values() if "template" in one.get("spec", {})]
    for spec in (one["spec"]["template"]["spec"] for one in found):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip


def test_probes_ask_the_routes_that_tell_the_truth(helm: Path) -> None:
    container = pod(render(helm, "--set", "probes.startupSeconds=60"))["containers"][0]
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 60


def test_service_reaches_the_pods(helm: Path) -> None:
    objects = render(helm)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    ports = {port["name"] for port in pod(objects)["containers"][0]["ports"]}
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] in ports


def test_settings_arrive_as_written_and_restart_the_pods(helm: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        "settings: {STREAMREC_MAX_BEAM_WIDTH: 1000000, STREAMREC_SOME_SHARE: 0.25, STREAMREC_SOME_SWITCH: false}"
    )
    changed, plain = render(helm, "--values", str(values)), render(helm)
    assert (
        changed["ConfigMap"]["data"].items()
        >= {
            "STREAMREC_MAX_BEAM_WIDTH": "1000000",
            "STREAMREC_SOME_SHARE": "0.25",
            "STREAMREC_SOME_SWITCH": "false",
        }.items()
    )
    before, after = (found["Deployment"]["spec"]["template"]["metadata"]["annotations"] for found in (plain, changed))
    assert before["checksum/config"] != after["checksum/config"]


def test_an_existing_secret_wins_over_the_values(helm: Path) -> None:
    objects = render(helm, "--set", "existingSecret=vault,redis.url=redis://plain:6379/0")
    assert objects["Secret"]["stringData"] == {"STREAMREC_REDIS_URL": "redis://plain:6379/0"}
    # Of two sources with the same name Kubernetes takes the last.
    assert pod(objects)["containers"][0]["envFrom"] == [
        {"configMapRef": {"name": "shop-streamrec"}},
        {"secretRef": {"name": "shop-streamrec"}},
        {"secretRef": {"name": "vault"}},
    ]
    sources = pod(render(helm))["containers"][0]["envFrom"]
    assert sources == [{"configMapRef": {"name": "shop-streamrec"}}], "a Secret that nobody makes keeps the pod waiting"


def secret_settings() -> dict[str, str]:
    """A value per setting that must not be read by whoever may read ConfigMaps; each holds the word hunter2."""
    found = {name: "hunter2" for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert {"redis_url", "user_hash_key"} <= found.keys()
    found |= {"api_keys": "hunter2", "admin_keys": "hunter2", "otlp_endpoint": "http://me:hunter2@collector:4318"}
    return {variable(name): value for name, value in found.items() if name != "redis_url"}


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@r:6379/0", "rediss://me:hunter2@r/1", "redis://r:6379/0?username=me&password=hunter2"]
)
def test_what_is_secret_lies_in_the_secret_alone(helm: Path, tmp_path: Path, url: str) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"redis": {"url": url}, "settings": secret_settings()}))
    objects = render(helm, "--values", str(values))
    assert objects.pop("Secret")["stringData"] == secret_settings() | {"STREAMREC_REDIS_URL": url}
    assert "hunter2" not in str(objects)


def test_a_changed_password_restarts_the_pods(helm: Path) -> None:
    one, two = (render(helm, "--set", f"redis.url=redis://:{word}@r:6379/0") for word in ("old", "new"))
    before, after = (found["Deployment"]["spec"]["template"]["metadata"]["annotations"] for found in (one, two))
    assert before["checksum/config"] != after["checksum/config"]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("rediss://r:6380/0", "rediss://r:6380/0?ssl_ca_certs=/etc/redis-tls/ca.crt"),
        ("rediss://r:6380/0?db=1", "rediss://r:6380/0?db=1&ssl_ca_certs=/etc/redis-tls/ca.crt"),
        (
            "rediss://r:6380/0?ssl_ca_certs=/etc/redis-tls/my.crt",
            "rediss://r:6380/0?ssl_ca_certs=/etc/redis-tls/my.crt",
        ),
    ],
)
def test_redis_is_trusted_by_the_authority_that_is_mounted(helm: Path, given: str, used: str) -> None:
    objects = render(helm, "--set", f"redis.url={given},redis.tlsSecret=redis-ca")
    url = objects["Secret"]["stringData"]["STREAMREC_REDIS_URL"]
    assert url == used
    pool = connect(url).connection_pool
    assert pool.connection_class is SSLConnection
    authority = Path(pool.connection_kwargs["ssl_ca_certs"])
    mount = next(one for one in pod(objects)["containers"][0]["volumeMounts"] if one["name"] == "redis-tls")
    assert mount == {"name": "redis-tls", "mountPath": str(authority.parent), "readOnly": True}
    assert {"name": "redis-tls", "secret": {"secretName": "redis-ca"}} in pod(objects)["volumes"]


@pytest.mark.parametrize(
    ("values", "cpu", "requested", "limit"),
    [
        ("podAnnotations.a=b", "1", "1024Mi", "2048Mi"),
        ("settings.STREAMREC_WORKERS=4", "4", "3328Mi", "6656Mi"),
        ("settings.STREAMREC_WORKERS=2,settings.STREAMREC_THREADS=3", "6", "1792Mi", "3584Mi"),
        ("settings.STREAMREC_WORKERS=4,sizing.memoryMi=0,sizing.memoryMiPerWorker=100", "4", "400Mi", "800Mi"),
        ("settings.STREAMREC_WORKERS=4,resources.requests.cpu=2,resources.limits.memory=9Gi", 2, "3328Mi", "9Gi"),
    ],
)
def test_resources_follow_the_workers(helm: Path, values: str, cpu: str, requested: str, limit: str) -> None:
    resources = pod(render(helm, "--set", values))["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": cpu, "memory": requested}, "limits": {"memory": limit}}


def test_a_number_in_quotes_is_a_number_all_the_same(helm: Path) -> None:
    resources = pod(render(helm, "--set-string", "settings.STREAMREC_WORKERS=4"))["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "4", "memory": "3328Mi"}


def test_replicas_are_spread_over_zones_and_nodes(helm: Path) -> None:
    objects = render(helm)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    spread = pod(objects)["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for constraint in spread:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway", "one node must still do"
    strict = pod(render(helm, "--set", "topologySpread.keys={disk},topologySpread.whenUnsatisfiable=DoNotSchedule"))
    (constraint,) = strict["topologySpreadConstraints"]
    assert (constraint["topologyKey"], constraint["whenUnsatisfiable"]) == ("disk", "DoNotSchedule")
    assert "topologySpreadConstraints" not in pod(render(helm, "--set-json", "topologySpread.keys=[]"))


def notes(helm: Path, *values: str) -> str:
    done = run(helm, "install", "shop", str(CHART), "--dry-run=client", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("NOTES:")[1]


def test_an_open_service_is_announced_loudly(helm: Path) -> None:
    assert "WARNING: no API keys are set.\n" in notes(helm)
    public = notes(helm, "--set", "ingress.enabled=true,ingress.host=recommend.example")
    assert "lets everybody reach it who can open recommend.example" in public
    assert "LoadBalancer is reachable from outside" in notes(helm, "--set", "service.type=LoadBalancer")
    # What a Secret holds is known to the cluster alone, and here there is none.
    assert "unless the Secret vault has an entry STREAMREC_API_KEYS" in notes(helm, "--set", "existingSecret=vault")
    assert "WARNING" not in notes(helm, "--set-string", f"settings.STREAMREC_API_KEYS={'a' * 64}")


def test_the_public_reaches_what_shops_call_and_nothing_else(helm: Path) -> None:
    rules = render(helm, "--set", "ingress.enabled=true,ingress.host=recommend.example")["Ingress"]["spec"]["rules"]
    public = {one["path"] for one in rules[0]["http"]["paths"]}
    app = create_app(Settings.model_construct())
    routes = {"/", "/docs", "/page/{name}", "/openapi.json", *app.openapi()["paths"]}
    reached = {route for route in routes if any(route == path or route.startswith(f"{path}/") for path in public)}
    # The client calls every route but those of operators and of machines.
    assert {route for route in routes - reached if not route.startswith("/v2")} == {
        *("/", "/docs", "/page/{name}", "/openapi.json"),
        *("/metrics", "/livez", "/readyz", "/traffic"),
    }
    assert not any(route.startswith("/v2") for route in reached)


def test_kubernetes_puts_no_variables_beside_the_settings(helm: Path) -> None:
    assert pod(render(helm))["enableServiceLinks"] is False


def test_own_bundle_is_mounted_read_only(helm: Path) -> None:
    spec = pod(render(helm, "--set", "bundle.existingClaim=models,bundle.path=/bundles/mine"))
    container = spec["containers"][0]
    assert container["args"][container["args"].index("--bundle") + 1] == "/bundles/mine"
    mount = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == "/bundles")
    assert mount["readOnly"] is True
    volume = next(volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ingress-adapter", ["cp", "-R", "/bundle/.", "/bundles/copied/"]),
        ("gpu-keda", ["copy", "--checksum", "store:models/shop/7", "/bundles/copied"]),
    ],
)
def test_a_bundle_is_copied_to_where_it_is_read(helm: Path, name: str, command: list[str]) -> None:
    spec = pod(example(helm, name))
    copier, container = spec["initContainers"][0], spec["containers"][0]
    assert (copier.get("command") or copier["args"]) == command
    assert container["args"][container["args"].index("--bundle") + 1] == "/bundles/copied"
    written = next(mount for mount in copier["volumeMounts"] if mount["mountPath"] == "/bundles/copied")
    read = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == "/bundles/copied")
    assert read == written | {"readOnly": True}


def test_grace_is_long_enough_for_the_drain(helm: Path) -> None:
    objects = render(helm, "--set", "drain.waitSeconds=7,drain.timeoutSeconds=40")
    hook = pod(objects)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(objects["ConfigMap"]["data"]["STREAMREC_DRAIN_TIMEOUT_S"])
    assert hook == ["sleep", "7"]
    assert pod(objects)["terminationGracePeriodSeconds"] == 7 + drain + 5
    default = render(helm)["ConfigMap"]["data"]["STREAMREC_DRAIN_TIMEOUT_S"]
    assert float(default) == Settings.model_fields["drain_timeout_s"].default


def test_a_gpu_is_asked_for_where_there_is_one(helm: Path) -> None:
    spec = pod(example(helm, "gpu-keda"))
    container = spec["containers"][0]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert container["image"].endswith("-gpu")
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert "nvidia" not in str(pod(render(helm)))


def test_the_autoscaler_follows_the_queue(helm: Path) -> None:
    objects = example(helm, "ingress-adapter")
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    metric = scaler["metrics"][0]["pods"]
    adapter = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text())
    assert metric["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]
    assert metric["target"] == {"type": "AverageValue", "averageValue": "20m"}
    assert "replicas" not in objects["Deployment"]["spec"], "helm upgrade would undo the autoscaler's work"


def test_keda_is_given_what_it_reads(helm: Path) -> None:
    objects = example(helm, "gpu-keda")
    spec = objects["ScaledObject"]["spec"]
    assert objects["ScaledObject"]["apiVersion"] == "keda.sh/v1alpha1"
    assert spec["scaleTargetRef"] == {"name": objects["Deployment"]["metadata"]["name"]}
    assert spec["minReplicaCount"] <= spec["maxReplicaCount"]
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold"}
    assert all(isinstance(value, str) for value in trigger["metadata"].values()), "KEDA takes strings alone"
    assert float(trigger["metadata"]["threshold"]) == 0.01


def test_users_keep_to_their_replica(helm: Path) -> None:
    objects = example(helm, "ingress-adapter")
    annotations = objects["Ingress"]["metadata"]["annotations"]
    assert annotations == {"nginx.ingress.kubernetes.io/upstream-hash-by": "$http_x_user_id"}
    backend = objects["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == objects["Service"]["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in objects["Service"]["spec"]["ports"]}


@pytest.mark.parametrize(
    ("values", "ports"),
    [
        ("redis.url=redis://r:6390/0", {53, 6390}),
        ("redis.url=redis://r", {53, 6379}),
        ("redis.url=rediss://:77@r:6391?db=1", {53, 6391}),
        ("redis.deploy=true", {53, 6379}),
        ("existingSecret=s,networkPolicy.egressPorts={6380,4318}", {53, 6379, 6380, 4318}),
        ("bundle.objectStore.path=store:b,bundle.objectStore.secret=s", {53, 443}),
        ("replicaCount=1", {53}),
    ],
)
def test_pods_reach_what_they_need_and_nothing_else(helm: Path, values: str, ports: set[int]) -> None:
    policy = render(helm, "--set", values)["NetworkPolicy"]["spec"]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == ports
    assert policy["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]


def test_policies_and_budget_select_the_pods(helm: Path) -> None:
    objects = example(helm, "redis-and-rules")
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    redis = objects["StatefulSet redis"]["spec"]["template"]["metadata"]["labels"].items()
    for kind, field in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        chosen = objects[kind]["spec"][field]["matchLabels"].items()
        assert chosen <= labels
        assert not chosen <= redis
    assert objects["NetworkPolicy redis"]["spec"]["podSelector"]["matchLabels"].items() <= redis
    (peer,) = objects["NetworkPolicy redis"]["spec"]["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"].items() <= labels
    assert objects["Service redis"]["spec"]["selector"].items() <= redis
    assert not objects["Service"]["spec"]["selector"].items() <= redis


def test_own_redis_is_found_and_keeps_histories(helm: Path) -> None:
    objects = example(helm, "redis-and-rules")
    address = objects["Secret"]["stringData"]["STREAMREC_REDIS_URL"]
    assert address == f"redis://{objects['Service redis']['metadata']['name']}:6379/0"
    args = objects["StatefulSet redis"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--maxmemory-policy") + 1] == "volatile-ttl"
    assert args[args.index("--appendonly") + 1] == "yes"


def test_replicas_know_that_they_are_several(helm: Path) -> None:
    """Whether existingSecret holds a Redis is for them to see: without one they keep nothing of users."""
    several = {"replicaCount=3": "3", "autoscaling.enabled=true,autoscaling.maxReplicas=7": "7"}
    for values, count in several.items():
        data = render(helm, "--set", f"existingSecret=vault,{values}")["ConfigMap"]["data"]
        assert data["STREAMREC_REPLICAS"] == count
    assert "STREAMREC_REPLICAS" not in render(helm)["ConfigMap"]["data"]


def test_prometheus_finds_the_service_and_its_rules(helm: Path) -> None:
    objects = example(helm, "redis-and-rules")
    monitor, rules = objects["ServiceMonitor"], objects["PrometheusRule"]
    assert monitor["apiVersion"] == rules["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == rules["metadata"]["labels"]["release"] == "prometheus"
    service = objects["Service"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    assert rules["spec"] == yaml.safe_load((CHART / "rules" / "alerts.yaml").read_text())
    dashboard = objects["ConfigMap dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"]["streamrec.json"] == (CHART / "dashboards" / "streamrec.json").read_text()


@pytest.mark.parametrize(
    "value",
    [
        "replicas=2", "settings.MAX_BEAM_WIDTH=1", "settings.STREAMREC_DRAIN_TIMEOUT_S=5", "service.port=0",
        "redis.url=http://x", "image.repository=", "ingress.enabled=true", "bundle.objectStore.path=store:b",
        "autoscaling.source=cpu", "podDisruptionBudget.maxUnavailable=0", "monitoring.rules.enable=true",
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(helm: Path, value: str) -> None:
    done = run(helm, "template", "shop", str(CHART), "--set", value)
    assert done.returncode != 0
    assert "schema" in done.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("bundle.existingClaim=a,bundle.image=b", "a pod serves one bundle"),
        ("redis.deploy=true,redis.url=redis://x:6379/0", "the service uses one Redis"),
        (
            "redis.deploy=true,autoscaling.enabled=true,autoscaling.minReplicas=9,autoscaling.maxReplicas=3",
            "must not exceed",
        ),
        ("replicaCount=2", "Several replicas need one Redis"),
        ("autoscaling.enabled=true", "Several replicas need one Redis"),
        ("settings.STREAMREC_REDIS_URL=redis://r", "Set redis.url, not settings.STREAMREC_REDIS_URL"),
        ("redis.url=redis://r,redis.tlsSecret=ca", "begins with rediss://"),
    ],
)
def test_values_that_contradict_are_refused_in_a_sentence(helm: Path, values: str, sentence: str) -> None:
    done = run(helm, "template", "shop", str(CHART), "--set", values)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_the_readme_installs_it(helm: Path) -> None:
    """What the README gives to `helm install`, `helm template` renders."""
    found = re.search(r"^helm install (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    name, chart, *values = shlex.split(found[1])
    done = run(helm, "template", name, str(ROOT / chart), *values)
    assert done.returncode == 0, done.stderr
