"""The real parts of the machine: two servers, bots, workers, and what was copied of them earlier."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from redis import Redis
from redis.connection import ConnectionPool

from consumers.db.engine import engine
from tests.faults.verdict import KeptEntry
from tests.property.delivery.bots import Bot, copy_folder
from tests.property.delivery.clock import Clock
from tests.property.delivery.faults import FaultyRedisConnection, faulty_postgres, faulty_sqlite, write_counts
from tests.property.delivery.servers import Database, Queued, RedisContents, Stored
from tests.property.delivery.workers import SteppedWorker

MOST_BOTS = 3
WORKERS = 2


class Contents(NamedTuple):
    """Content of all storages at one moment; the entries by bot."""

    entries: dict[Bot, list[KeptEntry]]
    stored: Stored
    queued: Queued

    @property
    def job_ids_kept(self) -> set[str]:
        """Ids of the jobs whose entries some outbox has."""
        return {one.delivery.job_id for kept in self.entries.values() for one in kept}


class Backup(NamedTuple):
    """Copy of a bot's folder. `needs_resend`: the database has lost commits since its last resend."""

    folder: Path
    needs_resend: bool


class World:
    """All parts. `reset` begins a new example."""

    def __init__(self, folder: Path, redis: Redis, database_url: str, clock: Clock) -> None:
        self.clock = clock
        self.database = Database(database_url)
        self.plain_redis, self.redis_contents = redis, RedisContents(redis)
        path = redis.connection_pool.connection_kwargs["path"]
        self.faulty_redis = Redis(connection_pool=ConnectionPool(connection_class=FaultyRedisConnection, path=path))
        self._folder = folder
        self._folders = 0
        self.bots: list[Bot] = []
        self.workers: list[SteppedWorker] = []
        self._read_at = (-1, -1, -1)

    def reset(self) -> None:
        self.database.clear()
        self.plain_redis.flushall()
        self.clock.reset()
        self.bots = [self.new_bot()]
        self.workers = [SteppedWorker(self.faulty_redis, f"worker-{number}") for number in range(WORKERS)]
        self.replica: list[tuple[bytes, int, bytes]] | None = None
        self.states_of_database: list[Stored] = []  # one after each commit that changed it
        self.old_database: Stored | None = None  # the backup
        self.backups: dict[Bot, Backup] = {}
        self.note_writes()

    def clear(self) -> None:
        """End all processes of an example, and delete its files."""
        for bot in self.bots:
            bot.kill()
        self.bots, self.workers = [], []
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        gc.collect(1)  # what this example has made

    def new_bot(self) -> Bot:
        return Bot(self.new_folder(), self.faulty_redis)

    def new_folder(self) -> Path:
        self._folders += 1
        folder = self._folder / f"bot-{self._folders}"
        folder.mkdir()
        return folder

    def copy_bot(self, bot: Bot) -> Bot:
        """Copy the folder of a bot, as for a second bot, and return that one."""
        other = self.new_bot()
        copy_folder(bot.folder, other.folder)
        other.needs_resend = bot.needs_resend
        self.note_writes()
        return other

    def back_up(self, bot: Bot) -> None:
        """Copy the folder of a bot, for a later `restore`."""
        self.backups[bot] = Backup(self.new_folder(), bot.needs_resend)
        copy_folder(bot.folder, self.backups[bot].folder)

    def restore(self, bot: Bot) -> None:
        """Replace the folder of a bot by its backup."""
        shutil.rmtree(bot.folder)
        copy_folder(self.backups[bot].folder, bot.folder)
        bot.needs_resend = bot.needs_resend or self.backups[bot].needs_resend

    def move(self, bot: Bot) -> None:
        """Rename the folder of a bot. If its processes run, they continue at the old path, and a new bot begins."""
        target = self.new_folder()
        target.rmdir()
        bot.folder.rename(target)
        moved = Bot(target, self.faulty_redis)
        moved.needs_resend = bot.needs_resend
        if bot.is_open:
            self.bots.append(moved)
        else:
            self.bots[self.bots.index(bot)] = moved

    def replace_database(self, old: Stored) -> None:
        """Make the database as it was, and note that all bots have to send again what was lost."""
        self.database.put_back(old)
        texts = [one.text for one in self.states_of_database]
        del self.states_of_database[texts.index(old.text) if old.text in texts else 0 :]
        for bot in self.bots:
            bot.needs_resend = True
        # A resend is undone if the outbox is replaced by a backup from before it.
        self.backups = {bot: one._replace(needs_resend=True) for bot, one in self.backups.items()}
        self.note_writes()

    def is_quiet(self) -> bool:
        """Return whether no entry is unsettled, no list has an active job, and no acknowledgement is unread."""
        contents = self.read()
        unsettled = any(one.state in ("pending", "sent") for kept in contents.entries.values() for one in kept)
        return not unsettled and not contents.queued.active() and not contents.queued.acknowledged

    def note_writes(self) -> None:
        """Note that the test itself has changed a storage."""
        write_counts.redis += 1
        write_counts.postgres += 1
        write_counts.sqlite += 1

    def read(self) -> Contents:
        """Read all storages; a storage that was not written to since the last time is not read again."""
        if self._read_at[0] != write_counts.sqlite:
            self._entries = {bot: bot.entries() for bot in self.bots}
        if self._read_at[1] != write_counts.postgres:
            self._stored = self.database.read()
            if not self.states_of_database or self.states_of_database[-1].text != self._stored.text:
                self.states_of_database.append(self._stored)
        if self._read_at[2] != write_counts.redis:
            self._queued = self.redis_contents.read()
        self._read_at = (write_counts.sqlite, write_counts.postgres, write_counts.redis)
        return Contents(self._entries, self._stored, self._queued)


@contextmanager
def a_world(folder: Path, redis: Redis, database_url: str) -> Iterator[World]:
    """Make the parts on these servers. In the block, this process has the clocks of the world."""
    clock = Clock()
    with (
        _without_logging(),
        _without_garbage_collection(),
        faulty_postgres(engine()),
        clock.installed(),
        faulty_sqlite(),
    ):
        world = World(folder, redis, database_url, clock)
        try:
            yield world
        finally:
            world.clear()
            world.database.close()
            world.faulty_redis.close()


@contextmanager
def _without_logging() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Free no cycles of objects by themselves: that closes connections, which must happen only between examples."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
