"""docker-compose.yml as it is written; what its services do stands in test_compose_services.py.

What only Docker can show is left out: the images, their entrypoints, and that the order of starting is kept.
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
    "redis": {"REDIS_PASSWORD"},
    "init-db": {"POSTGRES_PASSWORD", "HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"},
    "worker": {"HISTORY_WRITER_PASSWORD", "REDIS_PASSWORD"},
    "api": {"HISTORY_READER_PASSWORD", "REDIS_PASSWORD", "HISTORY_API_TOKEN"},
    "dashboard": {"REDIS_PASSWORD", "HISTORY_DASHBOARD_PASSWORD"},
    "relay": {"REDIS_PASSWORD"},
}


def _instructions() -> list[list[str]]:
    """Of the Dockerfile, in words; the same for all services of ours."""
    (dockerfile,) = {SERVICES[name]["build"]["dockerfile_inline"] for name in OURS}
    return [line.split() for line in dockerfile.splitlines()]


def test_it_is_a_compose_file() -> None:
    """By the JSON Schema of the Compose Specification: no key is misspelt, no value of a wrong type."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    found = subprocess.run(
        [*command, TOP / "docker-compose.yml"], capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stdout


def test_ports_are_open_to_this_machine_only() -> None:
    """Docker publishes a port without an address on all of them, and past the firewall."""
    ports = [port for name in SERVICES for port in service(name).get("ports", [])]
    assert len(ports) == 4
    assert [port for port in ports if not port.startswith(f"{LOCALHOST}:")] == []


def test_there_may_be_several_workers() -> None:
    """`--scale worker=N` needs that nothing of it is for one alone."""
    assert not {"container_name", "hostname", "ports", "volumes"} & set(SERVICES["worker"])


def test_each_condition_that_a_service_waits_for_can_be_met() -> None:
    """Who must be healthy has a check, and who must end is not started again; or the worker waits for ever."""
    waits = [wait for one in SERVICES.values() for wait in one.get("depends_on", {}).items()]
    for name, wait in waits:
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name], name
        else:
            assert SERVICES[name]["restart"] == "no", name


def test_the_relay_is_off_unless_it_is_asked_for() -> None:
    """It has the outboxes' volume only, and writes there as the user of the controllers, whom .env may name."""
    assert {name for name in SERVICES if "profiles" in SERVICES[name]} == {"relay"}
    relay = service("relay")
    assert (relay["profiles"], relay["user"]) == (["relay"], f"{NOBODY}:{NOBODY}")
    (volume,) = relay["volumes"]
    assert (volume["type"], volume["source"] in FILE["volumes"]) == ("volume", True)
    assert relay["command"][-1].startswith(f"{volume['target']}/")
    assert resolved(SERVICES["relay"]["user"], {"HISTORY_OUTBOX_USER": "1000:1000"}) == "1000:1000"


def test_whatever_serves_is_checked_started_again_and_given_time_to_end() -> None:
    """All but init-db, which ends by itself."""
    for name in set(SERVICES) - {"init-db"}:
        assert {"healthcheck", "stop_grace_period"} <= set(SERVICES[name]), name
        assert SERVICES[name]["restart"] == "unless-stopped", name


def test_no_service_can_do_more_than_its_work() -> None:
    """Neither root nor a capability, no file but in volumes and memory, no way to gain rights."""
    images = {name: one["user"] for name, one in SERVICES.items() if "image" in one}
    assert images == {"postgres": "postgres", "redis": "redis"}
    assert [line for line in _instructions() if line[0] == "USER"][-1] == ["USER", f"{NOBODY}:{NOBODY}"]
    for name, one in SERVICES.items():
        assert (one["read_only"], one["cap_drop"], one["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
        assert not {"cap_add", "privileged", "network_mode", "pid", "ipc", "devices"} & set(one), name
    assert [name for name in OURS if "volumes" in SERVICES[name] or "tmpfs" in SERVICES[name]] == ["relay"]
    # Where PostgreSQL has its socket, and the shell of its entrypoint its here-documents.
    assert set(SERVICES["postgres"]["tmpfs"]) == {"/run/postgresql", "/tmp"}


def test_no_service_can_use_up_the_machine() -> None:
    """Memory and processes of each are limited, and so are the logs; Docker refuses more cores than there are."""
    for name, one in SERVICES.items():
        assert {"mem_limit", "pids_limit"} <= set(one), name
        assert one.get("cpus", 1) == 1, name
        assert {"max-size", "max-file"} <= set(one["logging"]["options"]), name


def test_redis_is_full_before_its_container_is() -> None:
    """Full, it refuses what is new; a container without memory loses its process. Rewriting its file takes a copy."""
    (limit,) = re.findall(r"^maxmemory (\d+)mb$", SERVICES["redis"]["command"][-1], re.M)
    assert 2 * int(limit) < int(SERVICES["redis"]["mem_limit"].removesuffix("m"))


def test_a_service_that_needs_no_server_cannot_reach_it() -> None:
    """RQ Dashboard and a controller in a container have no way to PostgreSQL."""
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
    """To the version and to the release of Debian, whose C library decides how text is sorted in an index."""
    (python,) = [line[1] for line in _instructions() if line[0] == "FROM"]
    images = {python, *(one["image"] for one in SERVICES.values() if "image" in one)}
    pins = ("python:3.13.7-slim-bookworm", "postgres:16.10-bookworm", "redis:7.4.6-bookworm")
    assert {re.sub(r"\d+", "1", image) for image in images} == {re.sub(r"\d+", "1", pin) for pin in pins}


@pytest.mark.parametrize("name", SECRETS)
def test_a_missing_secret_is_an_error_that_names_it(name: str) -> None:
    """There is no default: unset or empty, Compose refuses the file and says which variable."""
    for variables in (SECRETS | {name: ""}, {key: value for key, value in SECRETS.items() if key != name}):
        with pytest.raises(LookupError, match=f"{name} is not set"):
            resolved(SERVICES, variables)


def test_each_service_knows_the_secrets_that_it_needs_and_no_others() -> None:
    """A secret comes from outside, and shows in no command line, health check or image."""
    for name in SERVICES:
        settings = service(name)
        environment = json.dumps(settings.pop("environment"), ensure_ascii=False)
        known = {key for key, value in SECRETS.items() if value in environment}
        assert known == _KNOWN_TO[name], name
        shown = json.dumps(settings, ensure_ascii=False)
        assert [key for key, value in SECRETS.items() if value in shown] == []


def test_one_command_makes_all_secrets_and_keeps_those_that_are_there(tmp_path: Path) -> None:
    """As somebody has it whose .env is of an earlier version, without a line's end; twice; for its owner only."""
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
    assert len(set(made[0].values())) == 4
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_the_image_is_made_of_files_and_extras_that_exist() -> None:
    """What the package's build reads is there and copied, Docker is sent no more, and the extras are declared."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))
    lines = _instructions()
    copied = {name for line in lines if line[0] == "COPY" for name in line[1:-1]}
    (install,) = (shlex.split(" ".join(line)) for line in lines if line[:3] == ["RUN", "pip", "install"])
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {"pyproject.toml", project["project"]["readme"], *wheel["packages"]}
    read |= {name.split("/")[0] for name in wheel["force-include"]}  # a file of a package comes with it
    assert copied == read | {f".ci/{install[install.index('--constraint') + 1]}"}
    assert [name for name in copied if not (TOP / name).exists()] == []
    nothing, *sent, caches = (line for line in (TOP / ".dockerignore").read_text().splitlines() if line[0] != "#")
    assert (nothing, set(sent), caches) == ("*", {f"!{name}" for name in copied}, "**/__pycache__")
    extras = set(re.findall(r"\w+", install[-1]))
    assert extras == {"api", "dashboard"}
    assert extras <= set(project["project"]["optional-dependencies"])
