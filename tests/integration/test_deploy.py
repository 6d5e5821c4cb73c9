"""consumers/deploy, and README.md's file for a controller in a container: valid, with commands that exist."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from typer.main import get_command

from consumers.cli import app
from consumers.embedded.child_processes import STOP_SECONDS
from consumers.settings import MetricsSettings, StoreSettings
from producers.relay_process import END_SECONDS
from producers.settings import TransportSettings
from tests.compose_file import FILE, NOBODY, SERVICES, TOP
from tests.documents import text_of

README = (TOP / "README.md").read_text("utf-8")
DEPLOY = TOP / "consumers" / "deploy"
_KUBERNETES = "1.34"  # the first that has all of it without a feature gate


def _unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # as configparser's documentation has it
    unit.read_string((DEPLOY / "systemd" / f"trading-history-{name}.service").read_text("utf-8"))
    return unit


def _parameters(command: list[str]) -> dict[str, Any]:
    """Of a command line of ours; raises when it is not one."""
    program, name, *arguments = command
    assert Path(program).name == "trading-history"
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a click group
    params: dict[str, Any] = commands[name].make_context(name, arguments).params
    return params


def _manifests() -> dict[tuple[str, str], Any]:
    manifests = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    return {(one["kind"], one["metadata"]["name"]): one for one in manifests}


def _pod(deployment: str) -> tuple[Any, Any]:
    """Its pod and its only container."""
    pod = _manifests()["Deployment", deployment]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def test_the_readme_of_the_folder_names_each_file() -> None:
    """And no file that is not there."""
    linked = re.findall(r"^\| \[.*?\]\((.*?)\) \|", (DEPLOY / "README.md").read_text("utf-8"), re.M)
    files = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()}
    assert set(linked) == files - {"README.md"}


def test_systemd_stops_the_pool_in_order() -> None:
    """SIGTERM goes to the pool only, and the pool has time for its workers to end."""
    unit = _unit("worker")
    service = unit["Service"]
    assert _parameters(shlex.split(service["ExecStart"]))["processes"] == 2
    assert (service["KillMode"], service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("mixed", "always", "0")
    assert float(service["TimeoutStopSec"]) > STOP_SECONDS


def test_systemd_gives_the_relay_its_outboxes_and_the_time_to_end() -> None:
    """As a user that may write them, with the hardening that the workers have."""
    service = _unit("relay")["Service"]
    outboxes = _parameters(shlex.split(service["ExecStart"]))["outboxes"]
    assert len(outboxes) == 2
    assert {str(path.parent) for path in outboxes} == {service["ReadWritePaths"]}
    assert "DynamicUser" not in service  # the files belong to the controllers' user
    assert service["User"]
    assert float(service["TimeoutStopSec"]) > END_SECONDS
    # The hardening of the workers' unit, and what DynamicUser=yes implies there.
    workers = _unit("worker")["Service"]
    hardening = {name: value for name, value in workers.items() if name.startswith(("Protect", "Restrict"))}
    del hardening["ProtectProc"], hardening["ProtectClock"]
    assert {name: service.get(name) for name in hardening} == hardening
    assert service["PrivateTmp"] == "yes"


def test_kubernetes_takes_the_manifests() -> None:
    """By its own schemas, without a field that it does not know."""
    assert len(_manifests()) == 3
    for manifest in _manifests().values():
        kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)


def test_the_pods_are_what_the_containers_are() -> None:
    """Commands, limits, user and probes as in docker-compose.yml; nothing is asked that an outage would fail."""
    for name, deployment in (("worker", "trading-history-worker"), ("api", "trading-history-api")):
        pod, container = _pod(deployment)
        parameters = _parameters(container["args"])
        if name == "api":
            assert parameters == _parameters(SERVICES[name]["command"])
        *_, port, path, status = SERVICES[name]["healthcheck"]["test"]
        (listening,) = container["ports"]
        asked = container["livenessProbe"]["httpGet"]
        assert (str(listening["containerPort"]), asked["path"], asked["port"]) == (port, path, listening["name"])
        assert status == "200"
        assert str(parameters.get("metrics_port", parameters.get("port"))) == port
        assert pod["securityContext"]["runAsUser"] == NOBODY
        assert pod["terminationGracePeriodSeconds"] >= int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        limit = container["resources"]["limits"]["memory"]
        assert limit.lower() == f"{SERVICES[name]['mem_limit']}i"
        known = {field.alias for field in MetricsSettings.model_fields.values()}
        assert {variable["name"] for variable in container.get("env", ())} <= known


def test_the_autoscaler_scales_the_workers_by_a_metric_that_exists() -> None:
    """And the deployment that it names is there."""
    scaler = _manifests()["HorizontalPodAutoscaler", "trading-history-worker"]["spec"]
    assert (scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"]) in _manifests()
    (metric,) = scaler["metrics"]
    name = metric["external"]["metric"]["name"].removeprefix("trading_history_")
    assert f"`{name}`" in text_of("consumers/ops/README.md")  # its metrics are compared with the exported ones


def test_a_controller_in_a_container_finds_redis(tmp_path: Path) -> None:
    """In a network that docker-compose.yml makes and Redis is in, by settings that exist."""
    (text,) = re.findall(r"<!-- controller -->\n```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "compose.yml").write_text(text, "utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*command, tmp_path / "compose.yml"], check=True, timeout=60)
    file = yaml.safe_load(text)
    (network,) = (one["name"] for one in file["networks"].values())
    project, _, network = network.partition("_")
    assert (project, network in FILE["networks"], network in SERVICES["redis"]["networks"]) == (
        FILE["name"],
        True,
        True,
    )
    environment = file["services"]["controller"]["environment"]
    assert set(environment) <= {field.alias for field in TransportSettings.model_fields.values()}
    assert set(environment).isdisjoint(field.alias for field in StoreSettings.model_fields.values())
    assert environment["REDIS_URL"].endswith("@redis:6379/0")
