"""RQ's options and commands with HistoryWorker: each does what the table in consumers/worker/RQ.md says.

None of them loses an event or stores it twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import rq.command
from click import Context
from click.testing import CliRunner
from redis import Redis
from rq.cli.cli import main
from rq.command import send_command, send_kill_horse_command, send_stop_execution_command, send_stop_job_command
from rq.cron import CronScheduler
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.handlers import record_portfolio_snapshot
from consumers.operations import get_portfolio_history
from consumers.worker.history_worker import HistoryWorker
from producers import entry_sender
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer
from tests.deliveries import assert_stored_once, burst, enqueue_snapshots, history_queue
from tests.documents import block, table
from tests.factories import a_snapshot
from tests.integration import test_rq_pool as pool
from tests.integration import test_worker_control as control
from tests.rq_programs import WORKER_NAME, registered_workers, rq_process, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

OURS = "consumers.worker.HistoryWorker"
_SNAPSHOT = "consumers.handlers.record_portfolio_snapshot"
# An operator's own classes. Each creates a file when it is used.
_CLASSES = """
from pathlib import Path
import redis, rq, rq.job

def used(name):
    (Path(__file__).parent / f"{name}.used").touch()

class OwnRedis(redis.Redis):
    def __init__(self, *args, **kwargs):
        used("connection")
        super().__init__(*args, **kwargs)

class OwnQueue(rq.Queue):
    def __init__(self, *args, **kwargs):
        used("queue")
        super().__init__(*args, **kwargs)

class OwnJob(rq.job.Job):
    def perform(self):
        used("job")
        return super().perform()

def handler(job, *exception):
    used("handler")
"""
_OWN_CLASSES = """
    --connection-class own.OwnRedis --queue-class own.OwnQueue --job-class own.OwnJob --exception-handler own.handler
    --serializer pickle --log-format LOG|%(asctime)s|%(message)s --date-format DATE --config own_settings
"""


@pytest.fixture
def own(tmp_path: Path, redis: Redis) -> Path:
    """Return a folder with an operator's own classes and a settings file for RQ's --config."""
    folder = tmp_path / "own modules"
    folder.mkdir()
    (folder / "own.py").write_text(_CLASSES)
    settings = f"REDIS_URL = {os.environ['REDIS_URL']!r}\nQUEUES = ['history']\nNAME = {WORKER_NAME!r}\n"
    (folder / "own_settings.py").write_text(settings)
    return folder


def _used(own: Path) -> set[str]:
    return {path.stem for path in own.glob("*.used")}


def _reject_one(redis: Redis) -> str:
    """Enqueue a job whose event will be rejected, and return its id."""
    return history_queue(redis).enqueue(_SNAPSHOT, "{}").id


def _forget_rejection(redis: Redis, job_id: str) -> None:
    """Check that the rejection is in the failed registry and in event_outcomes, and remove it from both."""
    registry = history_queue(redis).failed_job_registry
    assert registry.get_job_ids() == [job_id]
    registry.remove(job_id, delete_job=True)
    with get_db() as db:
        assert db.execute(text("DELETE FROM event_outcomes RETURNING job_id, outcome")).all() == [(job_id, "rejected")]


def test_a_burst_accepts_all_options_at_once(redis: Redis, own: Path, tmp_path: Path) -> None:
    """Options of the process, its log and RQ's records have the same effect as in RQ's worker; others have none."""
    job_ids = enqueue_snapshots(redis, 3)
    rejected = _reject_one(redis)
    later = history_queue(redis).enqueue_at(datetime(2026, 1, 1, tzinfo=UTC), _SNAPSHOT, "{}")
    log = tmp_path / "log"
    options = f"""{_OWN_CLASSES} --burst --logging_level DEBUG --results-ttl 7 --pid {tmp_path}/pid
        --maintenance-interval 1 --job-monitoring-interval 1 --disable-job-desc-logging --dequeue-strategy random
        --disable-default-exception-handler --with-scheduler --worker-class {OURS}""".split()
    with rq_process("worker", *options, "--path", str(own), log=log, url=False) as process:
        assert process.wait(30) == 0
        assert (tmp_path / "pid").read_text() == str(process.pid)

    assert redis.hget(f"rq:worker:{WORKER_NAME}", "pid") == str(process.pid).encode()
    assert _used(own) == {"connection", "queue"}
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("LOG|DATE|")] == []
    assert sum("stored event" in line for line in lines) == 3  # for more than one, only at DEBUG
    assert sum("does not run a scheduler" in line for line in lines) == 1
    assert sum("does not call exception handlers" in line for line in lines) == 1
    assert {redis.ttl(Job.key_for(job_id)) for job_id in job_ids} <= set(range(1, 8))
    assert (later.get_status(), history_queue(redis).scheduled_job_registry.count) == ("scheduled", 1)
    _forget_rejection(redis, rejected)
    assert_stored_once(redis, 3)


def test_the_scheduler_command_of_the_document_enqueues_scheduled_jobs(redis: Redis) -> None:
    """A job whose time has come goes to the queue. SIGTERM ends the scheduler."""
    event = encode(event_of(a_snapshot(), source="other/1", sequence=0))
    history_queue(redis).enqueue_at(datetime(2026, 1, 1, tzinfo=UTC), _SNAPSHOT, event)
    (program,) = re.findall(r'python -c "(.*)"\n', block("consumers/worker/RQ.md", "scheduler"))
    assert "serializer='json'" in program  # nothing is unpickled
    scheduler = subprocess.Popen([sys.executable, "-c", os.path.expandvars(program)], stdout=subprocess.DEVNULL)
    try:
        until(lambda: history_queue(redis).count == 1)
        burst(redis)
        assert_stored_once(redis, 1)
        scheduler.send_signal(signal.SIGTERM)
        assert scheduler.wait(10) == 0
    finally:
        scheduler.kill()
        scheduler.wait()


def test_max_jobs_ends_a_worker_after_that_number_of_jobs(redis: Redis, tmp_path: Path) -> None:
    """The other jobs stay in the queue, in their order. With --quiet, the log has warnings and errors only."""
    job_ids = enqueue_snapshots(redis, 5)
    with rq_process("worker", "--max-jobs", "2", "-q", "-w", OURS, "history", log=tmp_path / "log") as process:
        assert process.wait(30) == 0
    assert (history_queue(redis).job_ids, len(get_portfolio_history())) == (job_ids[2:], 2)
    assert (tmp_path / "log").read_text() == ""
    burst(redis)
    assert_stored_once(redis, 5)


def test_max_idle_time_ends_a_worker_and_its_name_is_unique(redis: Redis, tmp_path: Path) -> None:
    """The idle time begins with its last event. A high --worker-ttl is limited: RQ forgets a killed worker in 2 min."""
    options = ["--max-idle-time", "2", "--worker-ttl", "3000", "--verbose", "-w", OURS, "--name", WORKER_NAME]
    log = tmp_path / "log"
    with rq_process("worker", *options, "history", log=log) as process:
        until(lambda: registered_workers(redis) == {process.pid: WORKER_NAME})
        assert 60 < redis.ttl(f"rq:worker:{WORKER_NAME}") <= 120
        enqueue_snapshots(redis, 3)
        with pytest.raises(ValueError, match="active worker named"):
            HistoryWorker([history_queue(redis)], connection=redis, name=WORKER_NAME).work(logging_level="WARNING")
        assert process.wait(30) == 0
    assert "sent heartbeat" in log.read_text()  # which RQ logs at DEBUG
    assert registered_workers(redis) == {}
    assert_stored_once(redis, 3)


def test_a_pool_in_a_burst_accepts_all_options_at_once(redis: Redis, own: Path, tmp_path: Path) -> None:
    """It ends with status 0 when each worker has found the queue empty; no worker is started again."""
    enqueue_snapshots(redis, 30)
    rejected = _reject_one(redis)
    log = tmp_path / "log"
    options = [*_OWN_CLASSES.split(), "--burst", "--num-workers", "2", "--logging-level", "DEBUG", "-w", OURS]
    with rq_process("worker-pool", *options, "--path", str(own), log=log, url=False) as process:
        assert process.wait(30) == 0

    lines = log.read_text().splitlines()
    assert _used(own) == {"connection", "queue"}
    assert sum("started with PID" in line for line in lines) == 4  # each worker logs it twice
    assert sum("does not call exception handlers" in line for line in lines) == 2
    assert sum("stored event" in line for line in lines) == 30
    assert [
        line for line in lines if re.search(r"[Ww]orker \w{32}(: | does)", line) and not line.startswith("LOG|DATE|")
    ] == []
    _forget_rejection(redis, rejected)
    assert_stored_once(redis, 30)


def _construct_in_pool(redis: Redis) -> None:
    HistoryWorker([history_queue(redis)], connection=redis)
    defaults = [signal.default_int_handler, signal.SIG_DFL]
    os._exit([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != defaults)


def test_a_worker_in_a_pool_does_not_inherit_the_signal_handlers_of_the_pool(redis: Redis) -> None:
    """With them, a worker that is restarted during a stop would signal the other workers and not end itself."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        name = "Worker one (WorkerPool other)"  # as RQ names them
        child = multiprocessing.get_context("fork").Process(target=_construct_in_pool, args=(redis,), name=name)
        child.start()
        child.join(20)
        assert child.exitcode == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_while_rq_is_suspended_no_worker_starts(redis: Redis, tmp_path: Path) -> None:
    """`rq worker` ends with status 1 and takes no job. With `--duration`, the suspension ends after that time."""
    enqueue_snapshots(redis, 1)
    _invoke("suspend", "--duration", "1")
    redis.persist("rq:suspended")  # until the command has read it, however long its start takes
    with rq_process("worker", "-w", OURS, "history", log=tmp_path / "log") as process:
        assert process.wait(30) == 1
    assert "RQ is currently suspended" in (tmp_path / "log").read_text()
    assert history_queue(redis).count == 1
    _invoke("suspend", "--duration", "1")
    until(lambda: not redis.exists("rq:suspended"))
    burst(redis)
    assert_stored_once(redis, 1)


def test_commands_for_a_running_job_interrupt_no_job(redis: Redis, tmp_path: Path) -> None:
    """No job has its own process, and a batch is one transaction: the worker logs the commands and continues."""
    log = tmp_path / "log"
    with rq_process("worker", "--name", WORKER_NAME, "-w", OURS, "history", log=log) as process:
        with get_db() as db:
            db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
            (job_id,) = enqueue_snapshots(redis, 1)
            until(somebody_waits_for_a_lock)
            send_kill_horse_command(redis, WORKER_NAME)
            with pytest.raises(InvalidJobOperation):
                send_stop_job_command(redis, job_id, serializer=JSONSerializer)
            with pytest.raises(InvalidJobOperation):
                send_stop_execution_command(redis, job_id, "any")
            # Sent by a program that does not check the job's state first.
            send_command(redis, WORKER_NAME, "stop-job", job_id=job_id)
            send_command(redis, WORKER_NAME, "stop-execution", job_id=job_id, execution_id="any")
            until(lambda: log.read_text().count("command ignored") == 3)
        until(lambda: len(get_portfolio_history()) == 1)
        enqueue_snapshots(redis, 1, first=1)
        until(lambda: len(get_portfolio_history()) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert_stored_once(redis, 2)


def _invoke(command: str, *arguments: str) -> str:
    """Run `rq <command>` in this process and return its output."""
    run = CliRunner().invoke(main, [command, "--url", os.environ["REDIS_URL"], *arguments], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return run.output


def test_a_rejected_event_that_is_requeued_is_decided_again(redis: Redis) -> None:
    """If its obstacle is gone, it is stored and no rejection is left; else it is rejected again."""
    enqueue_snapshots(redis, 1)
    other = encode(event_of(a_snapshot(balance="1.5"), source="other/1", sequence=1))
    conflict = history_queue(redis).enqueue(_SNAPSHOT, other)
    burst(redis)
    for arguments, rows in ((["--all"], [0]), ([conflict.id], [1])):
        if rows == [1]:
            with get_db() as db:
                db.execute(text("DELETE FROM portfolio_history"))
        assert history_queue(redis).failed_job_registry.get_job_ids() == [conflict.id]
        assert "Requeueing 1 jobs" in _invoke("requeue", "--queue", "history", *arguments)
        burst(redis)
        assert [row["sequence"] for row in get_portfolio_history()] == rows
    assert history_queue(redis).failed_job_registry.count == 0
    with get_db() as db:
        assert db.scalar(text("SELECT count(*) FROM event_outcomes")) == 0


def test_an_outbox_sends_its_events_again_after_rq_empty(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so at the next check of its sent entries. The event is one row, and its receipt returns it."""
    monkeypatch.setattr(entry_sender, "_FIRST_CHECK_SECONDS", 0.5)
    receipts = producer.record_many([a_snapshot()])
    until(lambda: history_queue(redis).count == 1)
    assert _invoke("empty", "history") == "1 jobs removed from history queue\n"
    until(lambda: history_queue(redis).count == 1)
    burst(redis)
    assert receipts[0].wait(10) == get_portfolio_history()[0]["id"]
    assert len(get_portfolio_history()) == 1


def test_jobs_of_rq_enqueue_and_rq_cron_are_accepted_only_as_json(redis: Redis) -> None:
    """`rq enqueue` pickles by default and `rq cron` always: pickled jobs are rejected unread."""
    event = encode(event_of(a_snapshot(), source="other/1", sequence=0))
    call = ("--queue", "history", _SNAPSHOT, f":{json.dumps(event)}")
    _invoke("enqueue", "--serializer", "json", *call)
    burst(redis)
    assert_stored_once(redis, 1)

    _invoke("enqueue", *call)
    cron = CronScheduler(connection=redis)
    cron.register(record_portfolio_snapshot, "history", args=(event,), interval=1)
    cron.enqueue_jobs()
    burst(redis)
    with get_db() as db:
        reasons = db.scalars(text("SELECT DISTINCT reason FROM event_outcomes")).all()
    assert (len(reasons), history_queue(redis).failed_job_registry.count) == (1, 2), reasons
    assert "JSON" in reasons[0]
    assert len(get_portfolio_history()) == 1


_ALL_OPTIONS = test_a_burst_accepts_all_options_at_once
_POOL_OPTIONS = test_a_pool_in_a_burst_accepts_all_options_at_once
# The options of `rq worker` and `rq worker-pool`, RQ's commands, and its messages for workers: each with its test.
PROOFS: dict[str, Callable[..., None]] = {
    "--burst": _ALL_OPTIONS,
    "--config": _ALL_OPTIONS,
    "--connection-class": _POOL_OPTIONS,
    "--date-format": _ALL_OPTIONS,
    "--dequeue-strategy": _ALL_OPTIONS,
    "--disable-default-exception-handler": _ALL_OPTIONS,
    "--disable-job-desc-logging": _ALL_OPTIONS,
    "--exception-handler": _POOL_OPTIONS,
    "--job-class": _POOL_OPTIONS,
    "--job-monitoring-interval": _ALL_OPTIONS,
    "--log-format": _ALL_OPTIONS,
    "--logging-level": _POOL_OPTIONS,
    "--logging_level": _ALL_OPTIONS,
    "--maintenance-interval": _ALL_OPTIONS,
    "--max-idle-time": test_max_idle_time_ends_a_worker_and_its_name_is_unique,
    "--max-jobs": test_max_jobs_ends_a_worker_after_that_number_of_jobs,
    "--name": test_max_idle_time_ends_a_worker_and_its_name_is_unique,
    "--num-workers": pool.test_a_pool_replaces_a_killed_worker_and_ends_on_sigterm,
    "--path": _POOL_OPTIONS,
    "--pid": _ALL_OPTIONS,
    "--queue-class": _POOL_OPTIONS,
    "--quiet": test_max_jobs_ends_a_worker_after_that_number_of_jobs,
    "--results-ttl": _ALL_OPTIONS,
    "--serializer": _ALL_OPTIONS,
    "--url": test_max_jobs_ends_a_worker_after_that_number_of_jobs,
    "--verbose": test_max_idle_time_ends_a_worker_and_its_name_is_unique,
    "--with-scheduler": _ALL_OPTIONS,
    "--worker-class": _ALL_OPTIONS,
    "--worker-ttl": test_max_idle_time_ends_a_worker_and_its_name_is_unique,
    "rq cron": test_jobs_of_rq_enqueue_and_rq_cron_are_accepted_only_as_json,
    "rq empty": test_an_outbox_sends_its_events_again_after_rq_empty,
    "rq enqueue": test_jobs_of_rq_enqueue_and_rq_cron_are_accepted_only_as_json,
    "rq info": control.test_rqs_commands_accept_our_class,
    "rq requeue": test_a_rejected_event_that_is_requeued_is_decided_again,
    "rq resume": control.test_a_suspended_worker_takes_no_job_until_it_is_resumed,
    "rq suspend": test_while_rq_is_suspended_no_worker_starts,
    "rq worker": _ALL_OPTIONS,
    "rq worker-pool": pool.test_a_pool_replaces_a_killed_worker_and_ends_on_sigterm,
    "send_kill_horse_command": test_commands_for_a_running_job_interrupt_no_job,
    "send_shutdown_command": control.test_after_the_shutdown_command_a_worker_completes_its_batch,
    "send_stop_execution_command": test_commands_for_a_running_job_interrupt_no_job,
    "send_stop_job_command": test_commands_for_a_running_job_interrupt_no_job,
}


def _names_in_rq() -> set[str]:
    """Return the options, commands and messages of the installed RQ, from its command line and from rq.command."""
    names = {f"rq {command}" for command in main.commands}
    for command in (main.commands["worker"], main.commands["worker-pool"]):
        parameters = command.get_params(Context(command))
        options: list[Any] = [option for one in parameters for option in one.opts if option.startswith("--")]
        names |= set(options) - {"--help"}
    return names | {name for name in vars(rq.command) if re.fullmatch(r"send_\w+_command", name)}


def test_every_option_and_command_of_rq_is_documented_and_has_a_test() -> None:
    """A new version of RQ that adds or removes one makes this fail."""
    documented = re.findall(r"`([^`]+)`", " ".join(row[0] for row in table("consumers/worker/RQ.md", "options")))
    assert sorted(documented) == sorted(PROOFS) == sorted(_names_in_rq())


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(block("consumers/worker/RQ.md", "start with rq"), id="HistoryWorker"),
        pytest.param(block("consumers/worker/RQ.md", "start a stock worker"), id="stock worker"),
    ],
)
def test_the_start_commands_of_the_document_store_events_in_any_folder(
    redis: Redis, tmp_path: Path, command: str
) -> None:
    """Also in a folder that has its own package `consumers`, since `rq` searches the working folder last."""
    (tmp_path / "consumers").mkdir()
    (tmp_path / "consumers/__init__.py").write_text("raise SystemExit('another package')")
    enqueue_snapshots(redis, 1)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(f"{command.strip()} --burst", shell=True, check=True, timeout=60, cwd=tmp_path, env=environment)
    assert_stored_once(redis, 1)
