"""The files and documents of consumers/deploy: valid, and in agreement with the code and with each other."""

from __future__ import annotations

import configparser
import re
import shlex
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from pydantic import SecretStr
from redis.connection import SSLConnection
from redis.sentinel import SentinelConnectionPool
from rq.cli.helpers import get_redis_from_config
from typer.main import get_command

from consumers.cli import app
from consumers.db.database_url import parse_database_url
from consumers.embedded.child_processes import STOP_SECONDS
from consumers.ops.exposition import worker_registry
from consumers.ops.queue_health import QueueHealth
from consumers.settings import MetricsSettings, StoreSettings
from producers.redis_url import redis_client
from producers.relay_process import END_SECONDS
from producers.settings import TransportSettings
from tests.compose_file import FILE, LOCALHOST, NOBODY, SERVICES, TOP, service
from tests.documents import block, table

DEPLOY = TOP / "consumers" / "deploy"
_KUBERNETES = "1.34"  # the first release that has every field without a feature gate


def _unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case of names
    unit.read_string((DEPLOY / "systemd" / f"trading-history-{name}.service").read_text("utf-8"))
    return unit


def _parameters(command: list[str]) -> dict[str, Any]:
    """Return the parsed parameters of a `trading-history` command. Raise if the command does not accept them."""
    program, name, *arguments = command
    assert Path(program).name == "trading-history"
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a click group
    params: dict[str, Any] = commands[name].make_context(name, arguments).params
    return params


def _manifests() -> dict[tuple[str, str], Any]:
    manifests = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    return {(one["kind"], one["metadata"]["name"]): one for one in manifests}


def _pod(deployment: str) -> tuple[Any, Any]:
    """Return the pod of a Deployment and its only container."""
    pod = _manifests()["Deployment", deployment]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def test_the_document_lists_exactly_the_files_of_the_folder() -> None:
    linked = re.findall(r"^\| \[.*?\]\((.*?)\) \|", (DEPLOY / "README.md").read_text("utf-8"), re.M)
    files = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()}
    assert set(linked) == {name for name in files if not name.endswith(".md")}


def test_the_systemd_commands_install_what_the_unit_names() -> None:
    """The folder of the installation, the environment file and the unit's path are those of the unit."""
    commands = [shlex.split(line) for line in block("consumers/deploy/README.md", "systemd").splitlines()]
    assert {command[0] for command in commands} == {"sudo"}
    words = {word for command in commands for word in command}
    service = _unit("worker")["Service"]
    program = Path(shlex.split(service["ExecStart"])[0])
    assert {str(program.parents[1]), f"{program.parent}/pip", service["EnvironmentFile"]} <= words
    (unit,) = (word for word in words if word.endswith(".service"))
    extras = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {extra for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)} <= set(extras)
    (secret,) = (command for command in commands if service["EnvironmentFile"] in command)
    assert secret[1:4] == ["install", "-m", "600"]  # it has passwords
    assert (TOP / unit).is_file()


def test_the_kubernetes_commands_make_the_secrets_that_the_manifests_name() -> None:
    """The manifests' file exists, and each Deployment reads one of the Secrets."""
    *secrets, apply = (shlex.split(line) for line in block("consumers/deploy/README.md", "kubernetes").splitlines())
    assert apply[:2] == ["kubectl", "apply"]
    assert (TOP / apply[2].removeprefix("--filename=")).is_file()
    deployments = [name for kind, name in _manifests() if kind == "Deployment"]
    read = {_pod(name)[1]["envFrom"][0]["secretRef"]["name"] for name in deployments}
    assert {command[4] for command in secrets} == read
    for command in secrets:
        assert command[:4] == ["kubectl", "create", "secret", "generic"]
        assert command[5].startswith("--from-env-file=")


def test_systemd_sends_the_stop_signal_to_the_pool_only() -> None:
    """The pool has enough time for its workers to stop."""
    unit = _unit("worker")
    service = unit["Service"]
    assert _parameters(shlex.split(service["ExecStart"]))["processes"] == 2
    assert (service["KillMode"], service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("mixed", "always", "0")
    assert float(service["TimeoutStopSec"]) > STOP_SECONDS


def test_systemd_gives_the_relay_its_outboxes_and_enough_time_to_stop() -> None:
    """It runs as a user that may write the outboxes, with the same hardening as the workers."""
    service = _unit("relay")["Service"]
    outboxes = _parameters(shlex.split(service["ExecStart"]))["outboxes"]
    assert len(outboxes) == 2
    assert {str(path.parent) for path in outboxes} == {service["ReadWritePaths"]}
    assert "DynamicUser" not in service  # the controllers' user owns the files
    assert service["User"]
    assert float(service["TimeoutStopSec"]) > END_SECONDS
    # The workers' unit gets PrivateTmp from DynamicUser=yes.
    workers = _unit("worker")["Service"]
    hardening = {name: value for name, value in workers.items() if name.startswith(("Protect", "Restrict"))}
    del hardening["ProtectProc"], hardening["ProtectClock"]
    assert {name: service.get(name) for name in hardening} == hardening
    assert service["PrivateTmp"] == "yes"


def test_the_manifests_are_valid_for_kubernetes() -> None:
    """They have no field that the schemas of Kubernetes do not have."""
    assert len(_manifests()) == 3
    for manifest in _manifests().values():
        kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)


def test_the_pods_agree_with_docker_compose() -> None:
    """Commands, limits, user and probes are the same. The liveness probe does not fail during an outage."""
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
        assert pod["enableServiceLinks"] is False
        assert pod["terminationGracePeriodSeconds"] >= int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        limit = container["resources"]["limits"]["memory"]
        assert limit.lower() == f"{SERVICES[name]['mem_limit']}i"
        known = {field.alias for field in MetricsSettings.model_fields.values()}
        assert {variable["name"] for variable in container.get("env", ())} <= known


def test_the_autoscaler_names_an_existing_deployment_and_metric() -> None:
    scaler = _manifests()["HorizontalPodAutoscaler", "trading-history-worker"]["spec"]
    assert (scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"]) in _manifests()
    (metric,) = scaler["metrics"]
    collected = worker_registry(lambda: None, lambda: QueueHealth("history")).collect()
    assert metric["external"]["metric"]["name"] in {family.name for family in collected}


def test_a_controller_in_a_container_reaches_redis(tmp_path: Path) -> None:
    """Its network is one of docker-compose.yml that Redis joins, and its settings exist."""
    text = block("consumers/deploy/CONTAINERS.md", "controller")
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
    volumes = [volume.split(":")[1] for volume in file["services"]["controller"]["volumes"]]
    assert str(Path(environment["HISTORY_OUTBOX"]).parent) in volumes  # the outbox outlives the container


def test_the_table_of_services_agrees_with_docker_compose() -> None:
    """Each service is listed, with its published port and its networks."""
    rows = table("consumers/deploy/CONTAINERS.md", "services")
    ports = {name: service(name).get("ports", [f"{LOCALHOST}:none"]) for name in SERVICES}
    assert {tuple(cells[:1] + cells[2:]) for cells in rows} == {
        (f"`{name}`", ports[name][0].split(":")[1], ", ".join(f"`{network}`" for network in sorted(one["networks"])))
        for name, one in SERVICES.items()
    }


def test_the_commands_in_containers_exist() -> None:
    """Those of the owner run in the service that has the owner's login."""
    for line in block("consumers/deploy/CONTAINERS.md", "commands").splitlines():
        docker, command = line.split(" trading-history ")
        kind, *_, name = docker.removeprefix("docker compose ").split()
        assert (kind, name) in {("exec", "worker"), ("run", "init-db")}
        _parsed(command.split())


def _parsed(words: list[str]) -> dict[str, Any]:
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    params: dict[str, Any] = command.make_context("trading-history", words).params
    return params


def test_the_command_for_several_workers_exists() -> None:
    _, *words = block("consumers/deploy/MACHINES.md", "workers").split()
    parameters = _parsed(words)
    assert (parameters["processes"], parameters["metrics_port"]) == (2, 9464)


def _value(setting: str) -> str:
    """Return the value of a line NAME='value'."""
    return setting.strip().partition("=")[2].strip("'")


def test_rq_reads_from_its_module_what_the_sentinel_url_says() -> None:
    """Master, Sentinels, logins and time limits are the same."""
    client = redis_client(_value(block("consumers/deploy/MACHINES.md", "sentinel url")))
    namespace: dict[str, Any] = {}
    exec(block("consumers/deploy/MACHINES.md", "sentinel_settings.py"), namespace)
    found = []
    of_rq = get_redis_from_config(namespace)  # type: ignore[no-untyped-call]  # RQ does not annotate it
    for pool in (client.connection_pool, of_rq.connection_pool):
        assert isinstance(pool, SentinelConnectionPool)
        asked = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
        options = [pool.connection_kwargs[name] for name in ("username", "password", "db", "socket_timeout")]
        sentinels = [(one["host"], one["port"], one["password"], one["socket_timeout"]) for one in asked]
        found.append((pool.service_name, options, sentinels))
    assert found[0] == found[1]
    assert found[0][:2] == ("mymaster", ["user", "password", 0, 5])


def test_the_database_url_names_two_hosts() -> None:
    url = parse_database_url(SecretStr(_value(block("consumers/deploy/MACHINES.md", "database url"))))
    assert url.query["host"] == "db-1,db-2"


def test_the_urls_with_tls_check_certificate_and_name() -> None:
    database, redis = (_value(line) for line in block("consumers/deploy/SECURITY.md", "tls").splitlines())
    assert dict(parse_database_url(SecretStr(database)).query) == {
        "sslmode": "verify-full",
        "sslrootcert": "/etc/ssl/ca.pem",
    }
    connection = redis_client(redis).connection_pool.make_connection()
    assert isinstance(connection, SSLConnection)
    assert (connection.ca_certs, connection.cert_reqs, connection.check_hostname) == (
        "/etc/ssl/ca.pem",
        ssl.CERT_REQUIRED,
        True,
    )
