"""The doctor's judgements: of mounts, sizes, clocks and silences; and what it never tells."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.ops.doctor import software_checks
from consumers.ops.doctor.checks import Check, duration, looked, side_by_side, size
from consumers.ops.doctor.file_systems import Mount, mount_of
from consumers.ops.doctor.history_checks import lateness
from consumers.ops.doctor.masking import Mask
from consumers.ops.doctor.outbox_checks import access, contents, disk_check, outbox_checks, place_check, size_check
from consumers.ops.doctor.postgres_checks import clock_check
from consumers.terminal import print_checks
from producers.errors import OutboxOutdated
from producers.outbox import MAX_BYTES, Outbox
from producers.settings import TransportSettings
from tests.factories import a_snapshot
from tests.unit.test_outbox import write_outbox_of_before

MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
30 22 0:5 / /srv/shared\\040files rw,relatime shared:2 master:3 - nfs4 server:/export rw,vers=4.2
31 22 0:6 / /mnt/windows rw - cifs //server/share rw
32 22 0:7 / /mnt/ssh rw - fuse.sshfs me@host: rw
33 22 0:8 / /mnt/usb rw - fuseblk /dev/sdb1 rw
34 22 0:9 / /dev/shm rw - tmpfs tmpfs rw
35 22 0:10 / /mnt/host rw - 9p host rw
36 33 259:2 / /mnt/usb rw - xfs /dev/sdc1 rw
"""
CONTAINER = """\
500 400 0:50 / / rw,relatime master:9 - overlay overlay rw,lowerdir=/a,upperdir=/b
501 500 259:1 /volumes/data /app/data rw,relatime - ext4 /dev/nvme0n1p1 rw
"""
MONDAY = datetime(2026, 11, 2, tzinfo=UTC)
NO_SECRETS = Mask(())


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/srv/data/outbox.db", Mount("ext4", PurePath("/"))),
        ("/srv/shared files/outbox.db", Mount("nfs4", PurePath("/srv/shared files"))),
        ("/srv/shared files 2/outbox.db", Mount("ext4", PurePath("/"))),
        ("/mnt/usb/outbox.db", Mount("xfs", PurePath("/mnt/usb"))),
    ],
)
def test_a_file_is_on_the_deepest_and_latest_mount_above_it(path: str, mount: Mount) -> None:
    """By whole folder names, with what the kernel escapes."""
    assert mount_of(PurePath(path), MOUNTS) == mount


@pytest.mark.parametrize(
    ("path", "mounts", "container", "status", "found"),
    [
        ("/srv/data/outbox.db", MOUNTS, False, "ok", "on ext4"),
        ("/srv/shared files/outbox.db", MOUNTS, False, "fail", "over the network"),
        ("/mnt/windows/outbox.db", MOUNTS, False, "fail", "over the network"),
        ("/mnt/ssh/outbox.db", MOUNTS, False, "fail", "over the network"),
        ("/mnt/host/outbox.db", MOUNTS, False, "fail", "over the network"),
        ("/mnt/usb/outbox.db", MOUNTS, False, "ok", "on xfs"),
        ("/dev/shm/outbox.db", MOUNTS, False, "fail", "in memory"),
        ("/app/outbox.db", CONTAINER, True, "fail", "in the container's own layer"),
        ("/app/data/outbox.db", CONTAINER, True, "ok", "on ext4 (/app/data)"),
        ("/app/outbox.db", CONTAINER, False, "ok", "on overlay"),
        ("data/outbox.db", "22 1 259:1 / / rw - ext4 /dev/sda rw", False, "warn", "data/outbox.db is relative"),
        ("/srv/data/outbox.db", None, False, "ok", "/srv/data/outbox.db"),
    ],
)
def test_an_outbox_belongs_on_local_disk_that_stays(
    path: str, mounts: str | None, container: bool, status: str, found: str
) -> None:
    """Not on a network, in memory, in a container's layer, nor wherever the working folder happens to be."""
    check = place_check(Path(path), mounts, in_container=container)
    assert check.status == status
    assert found in check.found
    assert bool(check.advice) is (status != "ok")


@pytest.mark.parametrize(("share", "status"), [(0.1, "ok"), (0.6, "warn"), (0.95, "fail")])
def test_an_outbox_that_fills_up_is_told(share: float, status: str) -> None:
    """Above half, only what is not settled is left in it."""
    assert size_check(round(share * MAX_BYTES)).status == status


@pytest.mark.parametrize(("free", "status"), [(2**31, "ok"), (2**29, "warn"), (2**20, "fail")])
def test_a_disk_that_fills_up_is_told(free: int, status: str) -> None:
    """Less than what an outbox may take, and next to nothing."""
    assert disk_check(free).status == status


def test_an_outbox_counts_what_waits_and_says_that_nobody_sends_it(tmp_path: Path) -> None:
    """Old entries without a relay are wrong; with one, they are a warning; young ones are fine."""
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(), a_snapshot(after=timedelta(1))])
        young = _by_name(contents(TransportSettings.model_validate({"HISTORY_OUTBOX": path})))
        _age(path, seconds=3600)
        forsaken = _by_name(contents(TransportSettings.model_validate({"HISTORY_OUTBOX": path})))
        lock = outbox.relay_lock()
        assert lock.acquire()
        relayed = _by_name(contents(TransportSettings.model_validate({"HISTORY_OUTBOX": path})))
        lock.release()
        _age(path, seconds=100_000)
        assert lock.acquire()
        very_old = _by_name(contents(TransportSettings.model_validate({"HISTORY_OUTBOX": path})))
        lock.release()
        assert lock.acquire()  # looking does not keep it
        lock.release()

    assert [one["outbox"].status for one in (young, forsaken, relayed, very_old)] == ["ok", "fail", "warn", "fail"]
    assert young["outbox"].found.startswith("2 pending, 0 sent, the oldest ")
    assert "no process sends them" in forsaken["outbox"].found
    assert "60 min old" in relayed["outbox"].found
    assert young["outbox rejections"].status == "ok"


def test_an_outbox_of_an_earlier_release_is_told_once_and_left_alone(tmp_path: Path) -> None:
    """Its controller may still run. What can be seen without opening the file is told as well."""
    path = tmp_path / "deep" / "outbox.db"
    write_outbox_of_before(path, 2)
    checks = list(outbox_checks(TransportSettings.model_validate({"HISTORY_OUTBOX": path}), NO_SECRETS))
    assert [(one.name, one.status) for one in checks if "earlier release" in one.found] == [("outbox", "warn")]
    assert {"outbox access", "outbox place", "outbox disk"} < set(_by_name(checks))
    with pytest.raises(OutboxOutdated):
        Outbox(path)


def test_rejections_in_an_outbox_are_a_warning(tmp_path: Path) -> None:
    """They wait for a person."""
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET state = 'rejected', reason = 'why', settled_at = 1")
    db.close()
    check = _by_name(contents(TransportSettings.model_validate({"HISTORY_OUTBOX": path})))["outbox rejections"]
    assert (check.status, check.found) == ("warn", "1")


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o644, "ok"), (0o666, "warn")])
def test_an_outbox_that_anybody_may_write_is_told(tmp_path: Path, mode: int, status: str) -> None:
    """Read by others is usual, written by others is not."""
    path = tmp_path / "outbox.db"
    path.touch()
    path.chmod(mode)
    assert _by_name(access(path))["outbox access"].status == status


@pytest.mark.parametrize(("ours", "status"), [(True, "fail"), (False, "warn")])
def test_an_outbox_that_we_may_not_write_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool, status: str
) -> None:
    """Root may write everything, so the answer is given here; another user's outbox need not be open to us."""
    path = tmp_path / "outbox.db"
    path.touch()
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid if ours else path.stat().st_uid + 1)
    assert _by_name(access(path))["outbox access"].status == status


@pytest.mark.parametrize(
    ("ahead", "status", "found"),
    [
        (0.4, "ok", "as ours"),
        (-4.0, "ok", "as ours"),
        (90.0, "warn", "90 s ahead of ours"),
        (-90.0, "warn", "90 s behind ours"),
        (7200.0, "fail", "2 h ahead of ours"),
        (-400.0, "fail", "6 min behind ours"),
    ],
)
def test_a_clock_that_differs_is_told(ahead: float, status: str, found: str) -> None:
    """Seconds do not matter, minutes do."""
    check = clock_check(ahead)
    assert (check.status, found in check.found) == (status, True)


@pytest.mark.parametrize(
    ("step", "rows", "silence", "late"),
    [
        (timedelta(minutes=5), 100, timedelta(minutes=9), False),  # never sooner than ten minutes
        (timedelta(minutes=5), 100, timedelta(minutes=11), True),
        (timedelta(days=1), 100, timedelta(hours=35), False),
        (timedelta(days=1), 100, timedelta(hours=37), True),
        (timedelta(minutes=5), 5, timedelta(days=1), False),  # too few to tell
        (timedelta(minutes=5), 100, timedelta(days=91), False),  # retired
        (timedelta(minutes=5), 100, -timedelta(hours=1), False),  # rows from the future
    ],
)
def test_a_portfolio_is_late_by_its_own_measure(step: timedelta, rows: int, silence: timedelta, late: bool) -> None:
    """One and a half times the longest of its last intervals, which include weekends here."""
    instants = [MONDAY + n * step for n in range(rows)]
    if step < timedelta(hours=1) and rows > 5:
        instants = [moment + timedelta(days=5) for moment in instants]  # a Saturday: weekends count
    assert bool(lateness(instants, instants[-1] + silence)) is late


def test_a_weekend_is_no_silence_for_who_never_records_on_one() -> None:
    """Every five minutes of eight hours, Monday to Friday: quiet from Friday evening to Monday morning, then late."""
    days = [MONDAY + timedelta(days=n) for n in range(5)]
    instants = [day + timedelta(hours=9, minutes=5 * n) for day in days for n in range(97)][-201:]
    monday = MONDAY + timedelta(days=7)
    assert lateness(instants, monday + timedelta(hours=9)) is None
    assert lateness(instants, monday + timedelta(hours=20)) == "silent for 3 d 3 h, at most 16 h before"


@given(steps=st.lists(st.integers(1, 10**6), min_size=5, max_size=40), silence=st.integers(0, 90 * 86400))
def test_late_is_exactly_what_is_half_as_long_again_as_ever_before(steps: list[int], silence: int) -> None:
    """Whatever the order of the rows, when one falls on a weekend."""
    saturday = MONDAY - timedelta(days=2)
    instants = [saturday + timedelta(seconds=sum(steps[:n])) for n in range(len(steps) + 1)]
    late = lateness(instants[::-1], instants[-1] + timedelta(seconds=silence))
    assert bool(late) is (silence > max(1.5 * max(steps), 600))


@given(password=st.text(min_size=8).filter(lambda text: text.splitlines() == [text]))
def test_no_spelling_of_a_password_gets_through(password: str) -> None:
    """Raw, or percent-encoded, from a URL's login or its query, or from POSTGRES_PASSWORD."""
    encoded = quote(password.encode("utf-8", "replace"), safe="")
    environment = {
        "DATABASE_URL": f"postgresql://u:{encoded}@h/d",
        "REDIS_URL": f"redis://h?password={encoded}-in-query",
        "POSTGRES_PASSWORD": password,
    }
    told = Mask.of(environment).told(Exception(f"no {password} no {encoded} no {encoded}-in-query no"))
    assert password not in told
    assert encoded not in told


def test_one_look_that_fails_hides_nothing_of_the_others() -> None:
    """A defect is told as a failure; what a look had found before stands."""

    def broken() -> Iterator[Check]:
        yield Check("first", "ok", "fine")
        raise ZeroDivisionError("a defect")

    checks = list(looked("broken", broken, NO_SECRETS, advice="what to do"))
    unseen = list(looked("broken", broken, NO_SECRETS, unseen=(ZeroDivisionError,)))
    assert checks == [Check("first", "ok", "fine"), Check("broken", "fail", "a defect", "what to do")]
    assert (unseen[1].status, unseen[1].found) == ("warn", "cannot be seen: a defect")


def test_what_hangs_is_left_behind_with_what_it_has_found() -> None:
    """The others are not delayed by it."""
    never = threading.Event()

    def hanging() -> Iterator[Check]:
        yield Check("before", "ok", "fine")
        never.wait(60)

    began = time.monotonic()
    checks = side_by_side({"hanging": hanging, "other": lambda: [Check("other", "ok", "fine")]}, NO_SECRETS, 0.2)
    never.set()
    assert time.monotonic() - began < 10
    assert [(check.name, check.status) for check in checks] == [("before", "ok"), ("hanging", "fail"), ("other", "ok")]


@pytest.mark.parametrize(
    ("wrong", "check", "found"),
    [
        ({"rq": "4.0.0"}, "RQ", "4.0.0, but tested with"),
        ({"redis": "1.0"}, "packages", "wanted: redis"),
        ({"sqlalchemy": "1.4"}, "packages", "wanted: sqlalchemy"),
    ],
)
def test_a_package_of_the_wrong_version_is_told(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], check: str, found: str
) -> None:
    """With what was wanted and what is there."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: wrong.get(name) or real(name))
    checks = _by_name([*software_checks.rq_version(), *software_checks.packages()])
    assert (checks[check].status, found in checks[check].found) == ("fail", True)


def test_the_packages_of_this_installation_are_fine() -> None:
    """Else these tests would say nothing."""
    assert [check.status for check in (*software_checks.rq_version(), *software_checks.packages())] == ["ok", "ok"]


def test_a_controllers_installation_needs_no_database_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does without the extra."""
    monkeypatch.setattr(software_checks, "find_spec", lambda name: None)
    monkeypatch.setattr(metadata, "version", _only_without_database)
    assert [check.status for check in software_checks.packages()] == ["ok"]


_real_version = metadata.version


def _only_without_database(name: str) -> str:
    if name in ("sqlalchemy", "psycopg2-binary"):
        raise metadata.PackageNotFoundError(name)
    return _real_version(name)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "0 s"), (119, "119 s"), (125, "2 min"), (7300, "2 h"), (3 * 86400 + 7300, "3 d 2 h")]
)
def test_a_duration_is_told_in_units_that_matter(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_sizes_are_told_in_mib_and_gib() -> None:
    assert (size(1536 * 1024), size(3 * 2**30)) == ("1.5 MiB", "3.0 GiB")


def test_each_check_is_one_line_in_a_pipe_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Long, with what would be a style, and with what would steer a terminal."""
    checks = [
        Check("name", "fail", "[red]" + 400 * "x" + "\x1b[2J\n", "do"),
        Check("other", "warn", "y"),
        Check("z", "ok", ""),
    ]
    print_checks([asdict(check) for check in checks])
    assert capsys.readouterr().out.splitlines() == [
        "fail  name   [red]" + 400 * "x" + "�[2J� → do",
        "warn  other  y",
        "ok    z",
        "1 fine, 1 to look at, 1 wrong",
    ]


def _by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def _age(path: Path, *, seconds: float) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET recorded_at = ?", (time.time() - seconds,))
    db.close()
