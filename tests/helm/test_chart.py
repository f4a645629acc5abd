"""The chart, rendered by the real helm: valid for Kubernetes, hardened, and refusing values that mean nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "streamrec"
Objects = dict[str, dict[str, Any]]


def run(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=60)


def render(helm: Path, *arguments: str) -> Objects:
    """The chart's objects by kind."""
    done = run(helm, "template", "shop", str(CHART), "--namespace", "shop", *arguments)
    assert done.returncode == 0, done.stderr
    return {found["kind"]: found for found in yaml.safe_load_all(done.stdout) if found}


def pod(objects: Objects) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def test_lint_has_nothing_to_say(helm: Path) -> None:
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", ["1.25.0", "1.33.0"])
@pytest.mark.parametrize(
    "values", [[], ["--set", "existingSecret=r,bundle.existingClaim=b,settings.STREAMREC_MAX_BEAM_WIDTH=100"]]
)
def test_every_object_is_valid_for_kubernetes(helm: Path, version: str, values: list[str]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    objects = render(helm, "--kube-version", version, *values)
    assert {"ConfigMap", "Deployment", "Service"} <= objects.keys()
    for found in objects.values():
        kubernetes_validate.validate(found, version.removesuffix(".0"), strict=True)


def test_pod_is_hardened(helm: Path) -> None:
    spec = pod(render(helm))
    container = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }


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
    assert changed["ConfigMap"]["data"] == {
        "STREAMREC_MAX_BEAM_WIDTH": "1000000", "STREAMREC_SOME_SHARE": "0.25", "STREAMREC_SOME_SWITCH": "false",
    }
    before, after = (found["Deployment"]["spec"]["template"]["metadata"]["annotations"] for found in (plain, changed))
    assert before["checksum/config"] != after["checksum/config"]


def test_a_secret_wins_over_what_is_written_openly(helm: Path) -> None:
    objects = render(helm, "--set", "existingSecret=vault,redis.url=redis://plain:6379/0")
    assert objects["ConfigMap"]["data"] == {"STREAMREC_REDIS_URL": "redis://plain:6379/0"}
    # Of two sources with the same name Kubernetes takes the last.
    assert pod(objects)["containers"][0]["envFrom"] == [
        {"configMapRef": {"name": "shop-streamrec"}}, {"secretRef": {"name": "vault"}},
    ]


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
    "value", ["replicas=2", "settings.MAX_BEAM_WIDTH=1", "service.port=0", "redis.url=http://x", "image.repository="]
)
def test_values_that_mean_nothing_are_refused(helm: Path, value: str) -> None:
    done = run(helm, "template", "shop", str(CHART), "--set", value)
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_the_readme_installs_it(helm: Path) -> None:
    """What the README gives to `helm install`, `helm template` renders."""
    found = re.search(r"^helm install (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    name, chart, *values = shlex.split(found[1])
    done = run(helm, "template", name, str(ROOT / chart), *values)
    assert done.returncode == 0, done.stderr
