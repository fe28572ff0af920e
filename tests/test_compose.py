"""compose.yaml and the snippet of docs/production.md: valid, on this machine only, and true to what they start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from compose_pydantic import ComposeSpecification

import worker
from testbed.processes import SOURCE
from tests.lab import bare_settings
from workerkit.settings import Settings

Service = dict[str, Any]

TEXT = (SOURCE / "compose.yaml").read_text()
WITH_A_DEFAULT = re.compile(r"(?<!\$)\$\{(\w+):-([^}]*)\}")
# The image's own health check is that of a worker.
IMAGES = ("ai-worker", "ai-worker-flower", "ai-worker-example")


def read(text: str) -> dict[str, Any]:
    """What a compose file says where no variable is set."""
    return dict(yaml.safe_load(WITH_A_DEFAULT.sub(r"\2", text).replace("$$", "$")))


SERVICES: dict[str, Service] = read(TEXT)["services"]
PUBLISHED = [(name, port) for name, one in yaml.safe_load(TEXT)["services"].items() for port in one.get("ports", ())]

each_service = pytest.mark.parametrize("name", SERVICES)


def validate(text: str) -> None:
    """Raises: ValidationError, where it is no compose file."""
    parts = {name: part for name, part in read(text).items() if not name.startswith("x-")}
    ComposeSpecification.model_validate(parts)


def folder_file(name: str) -> Any:
    """A YAML file of examples/."""
    return yaml.safe_load((SOURCE / "examples" / name).read_text())


# ── what starts, and under which conditions ──────────────────────────────────────────────────────────────────────


def test_it_is_a_valid_compose_file() -> None:
    validate(TEXT)


def test_a_profile_starts_what_it_is_named_after() -> None:
    by_profile: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        by_profile.setdefault("".join(service.get("profiles", ())), set()).add(name)
    assert by_profile == {
        "": {"worker", "mongodb", "redis", "artifacts"},
        "monitoring": {"metrics", "prometheus", "grafana", "flower"},
        "example": {"example"},
    }


def test_every_port_has_a_variable_of_its_own_and_is_published_on_this_machine_only() -> None:
    form = re.compile(r"127\.0\.0\.1:\$\{([A-Z]+_PORT):-(\d+)\}:(\d+)")
    matches = [form.fullmatch(port) for _, port in PUBLISHED]
    assert None not in matches, PUBLISHED
    variables, on_the_host, inside = zip(*(match.groups() for match in matches if match), strict=True)
    assert on_the_host == inside
    assert len(set(variables)) == len(set(on_the_host)) == len(PUBLISHED) == len(SERVICES) - 1  # all but the worker


@each_service
def test_every_service_rotates_its_log(name: str) -> None:
    assert SERVICES[name]["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}


@each_service
def test_every_mounted_file_is_there(name: str) -> None:
    mounted = [volume.partition(":")[0] for volume in SERVICES[name].get("volumes", ()) if volume.startswith(".")]
    assert [path for path in mounted if not (SOURCE / path).exists()] == []


def test_it_passes_on_every_setting_but_those_that_it_decides_itself() -> None:
    decided = re.compile("CELERY_BROKER_URL|CELERY_RESULT_BACKEND|AWS_|S3_|SSL_CERT_")
    names = {name.upper() for name in Settings.model_fields if not decided.match(name.upper())}
    assert names <= set(SERVICES["worker"]["environment"])


# ── what runs in the worker's image ──────────────────────────────────────────────────────────────────────────────


def test_the_exporter_is_a_command_of_the_worker() -> None:
    assert SERVICES["metrics"]["command"][0] in worker.COMMANDS


def test_the_example_is_a_module_that_can_be_run() -> None:
    [*_, module] = SERVICES["example"]["entrypoint"]
    assert Path(SOURCE, *module.split("."), "__main__.py").exists()


@pytest.mark.parametrize("name", [name for name in SERVICES if SERVICES[name]["image"] in IMAGES and name != "worker"])
def test_what_isnt_a_worker_has_a_health_check_of_its_own_at_its_port(name: str) -> None:
    [inside] = [port.rpartition(":")[2] for service, port in PUBLISHED if service == name]
    assert f"http://127.0.0.1:{inside}/" in SERVICES[name]["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", ["metrics", "flower", "example"])
def test_what_isnt_a_worker_has_the_workers_servers_and_queue(name: str) -> None:
    shared = ("MONGODB_URL", "DATABASE_NAME", "REDIS_URL", "CELERY_QUEUE_NAME")
    assert SERVICES[name]["environment"] == {key: SERVICES["worker"]["environment"][key] for key in shared}


def packages(service: str) -> set[str]:
    return set(SERVICES[service]["build"]["args"]["EXTRA_PACKAGES"].split())


def requirements(path: str) -> set[str]:
    return set(re.findall(r"(?m)^[\w-]+", (SOURCE / path).read_text()))


def test_the_example_gets_the_packages_that_it_requires() -> None:
    assert requirements("examples/api/requirements.txt") - requirements("requirements.txt") == packages("example")


def test_every_package_that_an_image_gets_has_a_tested_version() -> None:
    assert packages("flower") | packages("example") <= requirements("constraints.txt")


# ── monitoring ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_prometheus_asks_the_exporter_at_its_port() -> None:
    [job] = folder_file("monitoring/prometheus.yaml")["scrape_configs"]
    [*_, port] = SERVICES["metrics"]["command"]
    assert job["static_configs"] == [{"targets": [f"metrics:{port}"]}]


def test_grafana_asks_prometheus_and_finds_the_dashboard() -> None:
    [source] = folder_file("grafana/datasources.yaml")["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    [provider] = folder_file("grafana/dashboards.yaml")["providers"]
    mounts = dict(reversed(volume.split(":")[:2]) for volume in SERVICES["grafana"]["volumes"])
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(f"{provider['options']['path']}/")
    assert "panels" in json.loads((SOURCE / mounts[home]).read_text())


# ── the snippet for an API's own compose file ────────────────────────────────────────────────────────────────────

PRODUCTION = (SOURCE / "docs" / "production.md").read_text()
[SNIPPET] = [block for block in re.findall(r"```yaml\n(.*?)```", PRODUCTION, re.DOTALL) if "ai-worker" in block]
OWN_FILE = "services:\n  mongodb:\n    image: mongo:7.0\n  redis:\n    image: redis:7.2-alpine\n"


def test_the_snippet_has_at_most_fifteen_lines_and_is_valid_below_the_apis_services() -> None:
    assert len(SNIPPET.splitlines()) <= 15
    validate(OWN_FILE + SNIPPET)


def test_the_snippet_starts_the_worker_as_compose_yaml_does() -> None:
    [(name, snippet)] = yaml.safe_load(SNIPPET).items()
    assert name == "worker"
    own = {"build", "env_file", "environment", "depends_on"}
    assert {key: part for key, part in snippet.items() if key not in own} == {
        key: SERVICES["worker"][key] for key in snippet if key not in own
    }


def test_the_snippet_names_the_hosts_that_the_contracts_urls_name() -> None:
    settings = bare_settings()
    urls = (settings.mongodb_url, settings.redis_url)
    hosts = {urlsplit(url.get_secret_value()).hostname for url in urls}
    assert set(yaml.safe_load(SNIPPET)["worker"]["depends_on"]) == hosts
