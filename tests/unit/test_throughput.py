"""The benchmark `throughput`: its ratios, and the packages of its peers."""

from __future__ import annotations

import tomllib

import pytest

from tests.benchmarks.drains import Drain
from tests.benchmarks.peer import PEERS
from tests.benchmarks.throughput import CONTENDERS, LIMIT, OURS, ratios
from tests.benchmarks.usage import Usage
from tests.documents import ROOT

_PGQUEUER, _AWA = (peer.contender for peer in PEERS)


def drains_at(*rates: int) -> list[Drain]:
    """Return one run of a second for each rate."""
    return [Drain(rate, 1.0, Usage(0.0, 0.0, 0.0, 0), 0) for rate in rates]


def test_each_contender_is_compared_with_the_limit_of_the_same_run() -> None:
    found = ratios({OURS: drains_at(50, 80), LIMIT: drains_at(100, 200)})
    assert found == {f"{OURS} / {LIMIT}": pytest.approx([0.5, 0.4])}


def test_the_worker_is_compared_with_the_fastest_peer() -> None:
    slow, fast = drains_at(10, 10, 10), drains_at(5, 20, 25)
    for peers in ({_PGQUEUER: slow, _AWA: fast}, {_PGQUEUER: fast, _AWA: slow}):
        found = ratios({OURS: drains_at(100, 100, 100), LIMIT: drains_at(100, 100, 100), **peers})
        (fastest,) = (name for name, runs in peers.items() if runs is fast)
        assert found[f"{OURS} / {fastest}"] == pytest.approx([20.0, 5.0, 4.0])
        assert len(found) == len(peers) + 2


def test_limit_worker_and_peers_are_contenders() -> None:
    assert {LIMIT, OURS, _PGQUEUER, _AWA} <= CONTENDERS.keys()


def test_the_dependency_group_and_the_document_name_each_package_of_the_peers() -> None:
    packages = {package for peer in PEERS for package in peer.packages}
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["bench"]
    assert {requirement.partition(">=")[0] for requirement in group} == packages
    assert f"pip install {' '.join(sorted(packages))}" in (ROOT / "tests/benchmarks/README.md").read_text()
