"""The content of docker-compose.yml. test_compose_services.py tests what its services do.

The images, their entrypoints and the order of starting need Docker and are not tested.
"""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.compose_file import FILE, LOCALHOST, NOBODY, OURS, SECRETS, SERVICES, TEXT, TOP, resolved, service

_KNOWN_TO = {
    "postgres": {"POSTGRES_PASSWORD"},
    "redis": {name for name in SECRETS if name.startswith("REDIS_")},
    "init-db": {"POSTGRES_PASSWORD", "HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"},
    "worker": {"HISTORY_WRITER_PASSWORD", "REDIS_WORKER_PASSWORD"},
    "api": {"HISTORY_READER_PASSWORD", "REDIS_READER_PASSWORD", "HISTORY_API_TOKEN"},
    "dashboard": {"REDIS_DASHBOARD_PASSWORD", "HISTORY_DASHBOARD_PASSWORD"},
    "relay": {"REDIS_CONTROLLER_PASSWORD"},
}


def _instructions() -> list[list[str]]:
    """Return the words of each line of the Dockerfile, which all our services share."""
    (dockerfile,) = {SERVICES[name]["build"]["dockerfile_inline"] for name in OURS}
    return [line.split() for line in dockerfile.splitlines()]


def test_the_file_is_valid_by_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    found = subprocess.run(
        [*command, TOP / "docker-compose.yml"], capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stdout


def test_ports_are_published_on_loopback_only() -> None:
    """Without an address, Docker publishes a port on all addresses and bypasses the firewall."""
    ports = [port for name in SERVICES for port in service(name).get("ports", [])]
    assert len(ports) == 4
    assert [port for port in ports if not port.startswith(f"{LOCALHOST}:")] == []


def test_the_worker_can_be_scaled() -> None:
    """`--scale worker=N` needs a service without a fixed name, port or volume."""
    assert not {"container_name", "hostname", "ports", "volumes"} & set(SERVICES["worker"])


def test_each_condition_in_depends_on_can_be_met() -> None:
    """A service that must be healthy has a health check. A service that must complete is not restarted."""
    waits = [wait for one in SERVICES.values() for wait in one.get("depends_on", {}).items()]
    for name, wait in waits:
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name], name
        else:
            assert SERVICES[name]["restart"] == "no", name


def test_the_relay_is_off_by_default() -> None:
    """It has only the outbox volume and runs as the controllers' user, which .env may set."""
    assert {name for name in SERVICES if "profiles" in SERVICES[name]} == {"relay"}
    relay = service("relay")
    assert (relay["profiles"], relay["user"]) == (["relay"], f"{NOBODY}:{NOBODY}")
    (volume,) = relay["volumes"]
    assert (volume["type"], volume["source"] in FILE["volumes"]) == ("volume", True)
    assert relay["command"][-1].startswith(f"{volume['target']}/")
    assert resolved(SERVICES["relay"]["user"], {"HISTORY_OUTBOX_USER": "1000:1000"}) == "1000:1000"


def test_each_service_has_a_health_check_a_restart_policy_and_a_grace_period() -> None:
    """Except init-db, which ends by itself."""
    for name in set(SERVICES) - {"init-db"}:
        assert {"healthcheck", "stop_grace_period"} <= set(SERVICES[name]), name
        assert SERVICES[name]["restart"] == "unless-stopped", name


def test_each_service_is_confined() -> None:
    """It has no root, no capabilities and no way to gain privileges, and writes only to volumes and memory."""
    images = {name: one["user"] for name, one in SERVICES.items() if "image" in one}
    assert images == {"postgres": "postgres", "redis": "redis"}
    assert [line for line in _instructions() if line[0] == "USER"][-1] == ["USER", f"{NOBODY}:{NOBODY}"]
    for name, one in SERVICES.items():
        assert (one["read_only"], one["cap_drop"], one["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
        assert not {"cap_add", "privileged", "network_mode", "pid", "ipc", "devices"} & set(one), name
    assert [name for name in OURS if "volumes" in SERVICES[name] or "tmpfs" in SERVICES[name]] == ["relay"]
    # For PostgreSQL's socket, and for here-documents of the entrypoint's shell.
    assert set(SERVICES["postgres"]["tmpfs"]) == {"/run/postgresql", "/tmp"}


def test_each_service_has_limits_of_memory_processes_and_logs() -> None:
    """The limit of cores is at most 1, because Docker rejects more than the machine has."""
    for name, one in SERVICES.items():
        assert {"mem_limit", "pids_limit"} <= set(one), name
        assert one.get("cpus", 1) == 1, name
        assert {"max-size", "max-file"} <= set(one["logging"]["options"]), name


def test_redis_reaches_its_own_limit_before_the_limit_of_its_container() -> None:
    """A full Redis rejects writes; a full container kills it. Rewriting the append-only file can double its memory."""
    (limit,) = re.findall(r"^maxmemory (\d+)mb$", SERVICES["redis"]["command"][-1], re.M)
    assert 2 * int(limit) < int(SERVICES["redis"]["mem_limit"].removesuffix("m"))


def test_only_services_that_need_postgresql_can_reach_it() -> None:
    """RQ Dashboard and a controller in a container cannot."""
    networks = {name: set(one["networks"]) for name, one in SERVICES.items()}
    assert set.union(*networks.values()) == set(FILE["networks"])
    on_store = {name for name, joined in networks.items() if joined & networks["postgres"]}
    assert on_store == {"postgres", "init-db", "worker", "api"}
    assert networks["redis"] == {"queue"}
    assert {name for name, joined in networks.items() if "queue" in joined} == {
        *("redis", "worker", "api", "dashboard", "relay")
    }
    assert {name for name, joined in networks.items() if "front" in joined} == {"api", "dashboard"}


def test_images_are_pinned() -> None:
    """To a version and a release of Debian, whose C library determines how text is sorted in an index."""
    (python,) = [line[1] for line in _instructions() if line[0] == "FROM"]
    images = {python, *(one["image"] for one in SERVICES.values() if "image" in one)}
    pins = ("python:3.13.7-slim-bookworm", "postgres:16.10-bookworm", "redis:7.4.6-bookworm")
    assert {re.sub(r"\d+", "1", image) for image in images} == {re.sub(r"\d+", "1", pin) for pin in pins}


@pytest.mark.parametrize("name", SECRETS)
def test_a_missing_secret_is_an_error_that_names_it(name: str) -> None:
    """A secret has no default. If it is unset or empty, Compose reports the name of the variable."""
    for variables in (SECRETS | {name: ""}, {key: value for key, value in SECRETS.items() if key != name}):
        with pytest.raises(LookupError, match=f"{name} is not set"):
            resolved(SERVICES, variables)


def test_each_service_gets_only_the_secrets_that_it_needs() -> None:
    """No secret is in a command line, a health check or an image."""
    for name in SERVICES:
        settings = service(name)
        environment = json.dumps(settings.pop("environment"), ensure_ascii=False)
        known = {key for key, value in SECRETS.items() if value in environment}
        assert known == _KNOWN_TO[name], name
        shown = json.dumps(settings, ensure_ascii=False)
        assert [key for key, value in SECRETS.items() if value in shown] == []


def test_the_first_command_makes_missing_secrets_and_keeps_existing_ones(tmp_path: Path) -> None:
    """Also after a .env without a final newline, and when it runs twice. Only the owner can read the file."""
    (command,) = re.findall(r"^#     (.*openssl.*)$", TEXT, re.M)
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD='p@ss $%41'\nREDIS_PASSWORD=old")
    made = []
    for _ in range(2):
        subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, timeout=20)
        made.append(dotenv_values(tmp_path / ".env", interpolate=False))
    assert made[0] == made[1]
    assert set(made[0]) == set(SECRETS)
    assert (made[0].pop("POSTGRES_PASSWORD"), made[0].pop("REDIS_PASSWORD")) == ("p@ss $%41", "old")
    assert all(re.fullmatch("[0-9a-f]{48}", value or "") for value in made[0].values())
    assert len(set(made[0].values())) == len(SECRETS) - 2
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_the_image_gets_exactly_the_files_that_the_build_reads() -> None:
    """The build context has no other file, and the extras exist."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))
    lines = _instructions()
    copied = {name for line in lines if line[0] == "COPY" for name in line[1:-1]}
    (install,) = (shlex.split(" ".join(line)) for line in lines if line[:3] == ["RUN", "pip", "install"])
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {"pyproject.toml", project["project"]["readme"], *wheel["packages"]}
    read |= {name.split("/")[0] for name in wheel["force-include"]}  # a file of a package is copied with the package
    assert copied == read | {f".ci/{install[install.index('--constraint') + 1]}"}
    assert [name for name in copied if not (TOP / name).exists()] == []
    nothing, *sent, caches = (line for line in (TOP / ".dockerignore").read_text().splitlines() if line[0] != "#")
    assert (nothing, set(sent), caches) == ("*", {f"!{name}" for name in copied}, "**/__pycache__")
    extras = set(re.findall(r"\w+", install[-1]))
    assert extras == {"api", "dashboard"}
    assert extras <= set(project["project"]["optional-dependencies"])
