"""examples/kubernetes.yaml: valid by the schemas of Kubernetes and KEDA, and true to the worker."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import worker
from testbed.api import Api
from testbed.processes import SOURCE
from tests.lab import TEXT, bare_settings, table
from workerkit.settings import Settings

Manifest = dict[str, Any]

KUBERNETES = "1.37"
MANIFESTS: list[Manifest] = list(yaml.safe_load_all((SOURCE / "examples" / "kubernetes.yaml").read_text()))
SCALED_OBJECT, TRIGGER_METADATA = yaml.safe_load_all((SOURCE / "tests" / "keda.yaml").read_text())
WORKER, SCALER, METRICS = MANIFESTS
END_BY_FORCE_S = 6  # after SHUTDOWN_GRACE, as docs/production.md says


# ── the schemas ──────────────────────────────────────────────────────────────────────────────────────────────────


def strict(schema: Any) -> Any:
    """The schema without other names than its own, as the API server takes a manifest."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{name: strict(part) for name, part in schema.items()}}


def validate(manifest: Manifest) -> None:
    """Raises: ValidationError of either library, with what is wrong."""
    if manifest["kind"] == "ScaledObject":
        jsonschema.validate(manifest["spec"], strict(SCALED_OBJECT["properties"]["spec"]))
        for trigger in manifest["spec"]["triggers"]:
            jsonschema.validate(trigger["metadata"], strict(TRIGGER_METADATA))
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: f"{one['kind']} {one['metadata']['name']}")
def test_the_manifest_is_valid(manifest: Manifest) -> None:
    validate(manifest)


@table(
    "manifest, break_it",
    ("a misspelt name in a Deployment", WORKER, lambda spec: spec.update(replicaCount=1)),
    ("a probe without what it asks", WORKER, lambda spec: container(spec)["livenessProbe"].update(exec=["true"])),
    ("a misspelt name in a ScaledObject", SCALER, lambda spec: spec.update(minReplicas=1)),
    ("a number as text", SCALER, lambda spec: spec.update(minReplicaCount="1")),
    ("a trigger without its query", SCALER, lambda spec: spec["triggers"][0]["metadata"].pop("query")),
    ("a trigger with a misspelt name", SCALER, lambda spec: spec["triggers"][0]["metadata"].update(database="x")),
)
def test_a_wrong_manifest_is_not_valid(manifest: Manifest, break_it: Callable[[Manifest], Any]) -> None:
    wrong = copy.deepcopy(manifest)
    break_it(wrong["spec"])
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────


def container(spec: Manifest) -> Manifest:
    """The one container of a Deployment's pods."""
    [one] = spec["template"]["spec"]["containers"]
    return dict(one)


def variables(manifest: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifest["spec"])["env"]}


def settings_of(manifest: Manifest) -> Settings:
    return bare_settings(**{name.lower(): value for name, value in variables(manifest).items()})


@pytest.mark.parametrize("manifest", [WORKER, METRICS], ids=["worker", "metrics"])
def test_its_variables_are_settings_and_its_command_exists(manifest: Manifest) -> None:
    assert {name.lower() for name in variables(manifest)} <= set(Settings.model_fields)
    assert settings_of(manifest).database_name == SCALER["spec"]["triggers"][0]["metadata"]["dbName"]
    assert container(manifest["spec"])["args"][0] in worker.COMMANDS


@pytest.mark.parametrize("manifest", [WORKER, METRICS], ids=["worker", "metrics"])
def test_its_user_is_the_images(manifest: Manifest) -> None:
    user = re.findall(r"(?m)^USER (\d+):(\d+)$", (SOURCE / "Dockerfile").read_text())
    context = manifest["spec"]["template"]["spec"]["securityContext"]
    assert [(str(context["runAsUser"]), str(context["runAsGroup"]))] == user


def test_its_grace_lets_a_job_end_within_its_soft_limit() -> None:
    settings = settings_of(WORKER)
    assert settings.shutdown_grace >= settings.celery_soft_time_limit
    grace_s = WORKER["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= settings.shutdown_grace + END_BY_FORCE_S


def test_never_do_two_exporters_run_which_would_count_everything_twice() -> None:
    assert METRICS["spec"]["replicas"] == 1
    assert METRICS["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_its_probes_are_the_images_health_check(probe: str) -> None:
    [health_check] = re.findall(r"(?m)^HEALTHCHECK .*CMD (\[.*\])$", (SOURCE / "Dockerfile").read_text())
    assert container(WORKER["spec"])[probe]["exec"]["command"] == json.loads(health_check)


def test_keda_scales_the_worker_and_leaves_at_least_one() -> None:
    assert SCALER["spec"]["scaleTargetRef"]["name"] == WORKER["metadata"]["name"]
    assert SCALER["spec"]["minReplicaCount"] == 1
    assert "replicas" not in WORKER["spec"]  # two would decide it


def test_keda_counts_the_jobs_that_wait_or_run_by_as_many_as_a_pod_takes(api: Api) -> None:
    metadata = SCALER["spec"]["triggers"][0]["metadata"]
    assert metadata["queryValue"] == variables(WORKER)["WORKER_CONCURRENCY"]
    assert metadata["collection"] == api.jobs.name
    for status in ("pending", "processing", "completed", "failed"):
        api.insert(TEXT, {"prompt": status}, status=status)
    counted = {job["status"] for job in api.jobs.find(json.loads(metadata["query"]))}
    assert counted == {"pending", "processing"}
