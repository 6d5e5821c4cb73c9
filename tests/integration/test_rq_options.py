"""Each option and command by which RQ starts or steers a HistoryWorker: README's table says what it does, a test that.

No way may lose or double an event.
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
from tests.factories import a_snapshot
from tests.integration import test_rq_pool as pool
from tests.integration import test_worker_control as control
from tests.rq_programs import WORKER_NAME, registered_workers, rq_process, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

OURS = "consumers.worker.HistoryWorker"
README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
_SNAPSHOT = "consumers.handlers.record_portfolio_snapshot"
# Somebody's own classes, each of which leaves a file when it is used.
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
    """A folder with classes of somebody's own, and with settings for RQ's --config."""
    folder = tmp_path / "own modules"
    folder.mkdir()
    (folder / "own.py").write_text(_CLASSES)
    settings = f"REDIS_URL = {os.environ['REDIS_URL']!r}\nQUEUES = ['history']\nNAME = {WORKER_NAME!r}\n"
    (folder / "own_settings.py").write_text(settings)
    return folder


def _used(own: Path) -> set[str]:
    return {path.stem for path in own.glob("*.used")}


def _reject_one(redis: Redis) -> str:
    """The id of a job whose event will be rejected."""
    return history_queue(redis).enqueue(_SNAPSHOT, "{}").id


def _forget_rejection(redis: Redis, job_id: str) -> None:
    """Check that it is where rejections are, and remove it from there."""
    registry = history_queue(redis).failed_job_registry
    assert registry.get_job_ids() == [job_id]
    registry.remove(job_id, delete_job=True)
    with get_db() as db:
        assert db.execute(text("DELETE FROM event_outcomes RETURNING job_id, outcome")).all() == [(job_id, "rejected")]


def test_a_burst_with_every_option_that_does_not_hinder_it(redis: Redis, own: Path, tmp_path: Path) -> None:
    """Those of the process, of its log and of RQ's bookkeeping do as with RQ's own worker; the others do nothing."""
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


def test_the_scheduler_of_the_readme_does_what_the_worker_does_not(redis: Redis) -> None:
    """A job whose time has come goes to the queue; SIGTERM ends it."""
    event = encode(event_of(a_snapshot(), source="other/1", sequence=0))
    history_queue(redis).enqueue_at(datetime(2026, 1, 1, tzinfo=UTC), _SNAPSHOT, event)
    (program,) = re.findall(r'python -c "(.*RQScheduler.*)"\n', README)
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


def test_a_limit_of_jobs_ends_it_after_as_many(redis: Redis, tmp_path: Path) -> None:
    """The rest stays in the queue, in its order. With --quiet, nothing but trouble is in the log."""
    job_ids = enqueue_snapshots(redis, 5)
    with rq_process("worker", "--max-jobs", "2", "-q", "-w", OURS, "history", log=tmp_path / "log") as process:
        assert process.wait(30) == 0
    assert (history_queue(redis).job_ids, len(get_portfolio_history())) == (job_ids[2:], 2)
    assert (tmp_path / "log").read_text() == ""
    burst(redis)
    assert_stored_once(redis, 5)


def test_a_limit_of_idle_time_ends_it_and_a_name_is_its_own(redis: Redis, tmp_path: Path) -> None:
    """Idle since its last event. Whatever --worker-ttl says, RQ knows of its death after two minutes."""
    options = ["--max-idle-time", "2", "--worker-ttl", "3000", "--verbose", "-w", OURS, "--name", WORKER_NAME]
    log = tmp_path / "log"
    with rq_process("worker", *options, "history", log=log) as process:
        until(lambda: registered_workers(redis) == {process.pid: WORKER_NAME})
        assert 60 < redis.ttl(f"rq:worker:{WORKER_NAME}") <= 120
        enqueue_snapshots(redis, 3)
        with pytest.raises(ValueError, match="active worker named"):
            HistoryWorker([history_queue(redis)], connection=redis, name=WORKER_NAME).work(logging_level="WARNING")
        assert process.wait(30) == 0
    assert "sent heartbeat" in log.read_text()  # which RQ says at DEBUG
    assert registered_workers(redis) == {}
    assert_stored_once(redis, 3)


def test_a_pool_in_a_burst_with_every_option(redis: Redis, own: Path, tmp_path: Path) -> None:
    """It ends when each worker has found the queue empty, with status 0; none is started again."""
    enqueue_snapshots(redis, 30)
    rejected = _reject_one(redis)
    log = tmp_path / "log"
    options = [*_OWN_CLASSES.split(), "--burst", "--num-workers", "2", "--logging-level", "DEBUG", "-w", OURS]
    with rq_process("worker-pool", *options, "--path", str(own), log=log, url=False) as process:
        assert process.wait(30) == 0

    lines = log.read_text().splitlines()
    assert _used(own) == {"connection", "queue"}
    assert sum("started with PID" in line for line in lines) == 4  # each worker says so twice
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


def test_a_worker_in_a_pool_does_not_begin_with_the_handlers_of_the_pool(redis: Redis) -> None:
    """They would pass the signal on to its siblings and let it run, as in one that is started again during a stop."""
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


def test_a_suspended_rq_starts_no_worker_and_ends_the_suspension_in_time(redis: Redis, tmp_path: Path) -> None:
    """`rq worker` ends with status 1 before it has taken anything; `--duration` resumes by itself."""
    enqueue_snapshots(redis, 1)
    _invoke("suspend", "--duration", "1")
    redis.persist("rq:suspended")  # until the command has looked, however long it took to start
    with rq_process("worker", "-w", OURS, "history", log=tmp_path / "log") as process:
        assert process.wait(30) == 1
    assert "RQ is currently suspended" in (tmp_path / "log").read_text()
    assert history_queue(redis).count == 1
    _invoke("suspend", "--duration", "1")
    until(lambda: not redis.exists("rq:suspended"))
    burst(redis)
    assert_stored_once(redis, 1)


def test_commands_for_a_running_job_interrupt_none(redis: Redis, tmp_path: Path) -> None:
    """There is no process for a job alone, and a batch is one transaction: the worker logs them and goes on."""
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
            # As a program would that does not ask first.
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
    """Run `rq <command>` in this process; what it printed."""
    run = CliRunner().invoke(main, [command, "--url", os.environ["REDIS_URL"], *arguments], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return run.output


def test_a_rejected_event_that_is_requeued_is_decided_anew(redis: Redis) -> None:
    """Stored when what was in its way is gone, and then no rejection is left; else rejected again."""
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


def test_an_emptied_queue_is_filled_again_by_the_outbox(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as it looks after what it has sent: the event is one row, and its receipt says so."""
    monkeypatch.setattr(entry_sender, "_FIRST_CHECK_SECONDS", 0.5)
    receipts = producer.record_many([a_snapshot()])
    until(lambda: history_queue(redis).count == 1)
    assert _invoke("empty", "history") == "1 jobs removed from history queue\n"
    until(lambda: history_queue(redis).count == 1)
    burst(redis)
    assert receipts[0].wait(10) == get_portfolio_history()[0]["id"]
    assert len(get_portfolio_history()) == 1


def test_jobs_that_rq_enqueues_itself_are_taken_when_they_are_json(redis: Redis) -> None:
    """`rq enqueue` pickles unless told otherwise, `rq cron` always: what is pickled is refused unread."""
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


_ALL_OPTIONS = test_a_burst_with_every_option_that_does_not_hinder_it
_POOL_OPTIONS = test_a_pool_in_a_burst_with_every_option
# Each option of RQ's two commands that start workers, each of its commands, and each message that it has for a worker.
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
    "--max-idle-time": test_a_limit_of_idle_time_ends_it_and_a_name_is_its_own,
    "--max-jobs": test_a_limit_of_jobs_ends_it_after_as_many,
    "--name": test_a_limit_of_idle_time_ends_it_and_a_name_is_its_own,
    "--num-workers": pool.test_a_pool_replaces_a_worker_that_is_killed_and_ends_on_sigterm,
    "--path": _POOL_OPTIONS,
    "--pid": _ALL_OPTIONS,
    "--queue-class": _POOL_OPTIONS,
    "--quiet": test_a_limit_of_jobs_ends_it_after_as_many,
    "--results-ttl": _ALL_OPTIONS,
    "--serializer": _ALL_OPTIONS,
    "--url": test_a_limit_of_jobs_ends_it_after_as_many,
    "--verbose": test_a_limit_of_idle_time_ends_it_and_a_name_is_its_own,
    "--with-scheduler": _ALL_OPTIONS,
    "--worker-class": _ALL_OPTIONS,
    "--worker-ttl": test_a_limit_of_idle_time_ends_it_and_a_name_is_its_own,
    "rq cron": test_jobs_that_rq_enqueues_itself_are_taken_when_they_are_json,
    "rq empty": test_an_emptied_queue_is_filled_again_by_the_outbox,
    "rq enqueue": test_jobs_that_rq_enqueues_itself_are_taken_when_they_are_json,
    "rq info": control.test_rqs_commands_may_name_our_class_too,
    "rq requeue": test_a_rejected_event_that_is_requeued_is_decided_anew,
    "rq resume": control.test_a_suspended_worker_takes_nothing_new_until_it_is_resumed,
    "rq suspend": test_a_suspended_rq_starts_no_worker_and_ends_the_suspension_in_time,
    "rq worker": _ALL_OPTIONS,
    "rq worker-pool": pool.test_a_pool_replaces_a_worker_that_is_killed_and_ends_on_sigterm,
    "send_kill_horse_command": test_commands_for_a_running_job_interrupt_none,
    "send_shutdown_command": control.test_after_the_shutdown_command_a_worker_finishes_its_batch,
    "send_stop_execution_command": test_commands_for_a_running_job_interrupt_none,
    "send_stop_job_command": test_commands_for_a_running_job_interrupt_none,
}


def _of_rq() -> set[str]:
    """As this version of RQ has them, in its `--help` and in its module of messages for workers."""
    names = {f"rq {command}" for command in main.commands}
    for command in (main.commands["worker"], main.commands["worker-pool"]):
        parameters = command.get_params(Context(command))
        options: list[Any] = [option for one in parameters for option in one.opts if option.startswith("--")]
        names |= set(options) - {"--help"}
    return names | {name for name in vars(rq.command) if re.fullmatch(r"send_\w+_command", name)}


def test_every_option_and_command_of_rq_is_in_the_readme_and_has_a_test() -> None:
    """One that a new version of RQ adds, or takes away, is noticed here."""
    table = README.split("### RQ's options and commands", 1)[1].split("\n#", 1)[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`([^`]+)`", " ".join(firsts))
    assert sorted(named) == sorted(PROOFS) == sorted(_of_rq())
