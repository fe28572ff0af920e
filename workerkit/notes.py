"""What workers note for each other in Redis: results that MongoDB couldn't take, and tasks that were revoked.

Each key has the queue and the database in its name, since one Redis may serve several of both.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import redis
from bson import ObjectId, json_util
from bson.errors import BSONError

from workerkit.errors import NotesRefused, NotesUnavailable
from workerkit.logs import logger
from workerkit.results import Media, Result

T = TypeVar("T")
REVOKED, EXPIRED = "revoked", "expired"
REASONS = {REVOKED: REVOKED, EXPIRED: EXPIRED}


def asking(action: Callable[[], T]) -> T:
    """Asks Redis. Raises NotesUnavailable: it can't be reached. NotesRefused: it refuses this user the key."""
    try:
        return action()
    except redis.exceptions.NoPermissionError as error:
        raise NotesRefused("Redis: NoPermissionError") from error
    except redis.RedisError as error:
        raise NotesUnavailable(f"Redis: {type(error).__name__}") from error


def result_name(job_id: object, first_started_at: datetime) -> str:
    """The name under which a result is kept. A job that was put back doesn't find its former life's."""
    return f"{job_id}:{int(first_started_at.timestamp() * 1000)}"


@dataclass(frozen=True)
class RevokedTask:
    """A task that Celery dropped or killed: which job its message named, its id, and why (`revoked` or `expired`)."""

    job_id: str
    task_id: str
    why: str

    def dump(self) -> str:
        return json.dumps([self.job_id, self.task_id, self.why])


class SharedNotes:
    """A finished generation is kept here under a name that its job and that job's life have. It expires by itself."""

    KEPT_S = 3600
    WATCHED_S = 3  # that a note of cancelled jobs counts
    REST_S = 10.0

    def __init__(self, client: redis.Redis, queue: str = "", database_name: str = "") -> None:
        self._redis, self._queue, self._database_name = client, queue, database_name
        self._ask_again_at = 0.0

    def _key(self, what: str, queue: str | None = None) -> str:
        return f"{what}:{queue or self._queue}:{self._database_name}"

    def keep_result(self, name: str, result: Result) -> bool:
        """Keeps a finished generation for the next attempt, for an hour. False: Redis doesn't take it."""
        media = result.media and [result.media.data, result.media.suffix, result.media.url_field]
        try:
            # Not set again (nx), so that it expires in the end however often it is kept.
            kept = json_util.dumps([result.output, media])
            self._redis.set(f"{self._key('result')}:{name}", kept, ex=self.KEPT_S, nx=True)
        except redis.RedisError as error:
            logger.error("a finished result could not be kept in Redis: %s", type(error).__name__)
            return False
        return True

    def kept_result(self, name: str, queue: str | None = None) -> Result | None:
        """What a worker of a queue (by default this one) kept under this name, or None; also if that may not be read.

        Raises NotesUnavailable: Redis can't be asked.
        """
        try:
            raw: Any = asking(lambda: self._redis.get(f"{self._key('result', queue)}:{name}"))
        except NotesRefused:
            return None
        if not raw:
            return None
        output, media = json_util.loads(raw)
        return Result(output, media and Media(*media))

    def forget_result(self, name: str) -> None:
        with contextlib.suppress(redis.RedisError):  # it expires by itself
            self._redis.delete(f"{self._key('result')}:{name}")

    def note_cancelled(self, queues: Sequence[str], job_ids: Sequence[object]) -> None:
        """Notes for all workers of these queues which jobs were cancelled lately. It is to be repeated every second."""
        if time.monotonic() < self._ask_again_at:
            return
        ids = json.dumps([str(job_id) for job_id in job_ids])
        for queue in queues:
            try:
                self._redis.set(self._key("cancelled", queue), ids, ex=self.WATCHED_S)
            except redis.ResponseError:  # workers that find no note look for themselves
                continue
            except redis.RedisError:
                self._ask_again_at = time.monotonic() + self.REST_S
                return

    def cancelled(self) -> set[str] | None:
        """The ids of jobs that were cancelled lately. None: no worker watches for them, or Redis can't be asked.

        After a failure it isn't asked for a while, since each try may take seconds.
        """
        if time.monotonic() < self._ask_again_at:
            return None
        try:
            raw: Any = self._redis.get(self._key("cancelled"))
            return None if raw is None else set(json.loads(raw))
        except (redis.RedisError, ValueError, TypeError):
            self._ask_again_at = time.monotonic() + self.REST_S
            return None

    def forget_cancelled(self, queues: Sequence[str]) -> None:
        """Deletes these queues' notes of cancelled jobs, so that their workers look for themselves at once.

        Whoever has just cancelled jobs calls it: the last note, which counts for up to three seconds, lacks them.
        """
        with contextlib.suppress(redis.RedisError):  # then the next note has them
            for queue in queues:
                self._redis.delete(self._key("cancelled", queue))

    def note_revoked(self, task: RevokedTask) -> None:
        """Notes a revoked task, until a sweep has failed its job."""
        try:
            self._redis.sadd(self._key("revoked"), task.dump())
        except redis.RedisError as error:
            what = (task.job_id, task.why, type(error).__name__)
            logger.warning("job=%s its task was %s, but this can't be noted in Redis: %s", *what)

    def revoked(self, queue: str | None = None) -> list[RevokedTask]:
        """The revoked tasks of a queue, by default this one; none of another one's that may not be read.

        A note without sense is deleted. Raises NotesUnavailable: Redis can't be asked.
        """
        key, tasks = self._key("revoked", queue), []
        try:
            members: Any = asking(lambda: self._redis.smembers(key))
        except NotesRefused:
            if key == self._key("revoked"):
                raise
            return []
        for member in members:
            try:
                task = RevokedTask(*json.loads(member))
                tasks.append(RevokedTask(str(ObjectId(task.job_id)), str(task.task_id), REASONS[task.why]))
            except (ValueError, TypeError, KeyError, BSONError):
                with contextlib.suppress(redis.RedisError):
                    self._redis.srem(key, member)
        return tasks

    def forget_revoked(self, task: RevokedTask, queue: str | None = None) -> None:
        with contextlib.suppress(redis.RedisError):  # failing the job once more does nothing
            self._redis.srem(self._key("revoked", queue), task.dump())
