"""What reaches the log: one line per event, no prompt, no key, and no flood while a server is away."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery.exceptions import Reject

from workerkit.values import as_mapping

logger = logging.getLogger("worker")  # every line of ours goes through it, so that DEBUG governs all of them

REPEAT_AFTER_S = 60.0
TASK_IN_TEMPLATE = "%s[%s]"  # how Celery's lines name a task and its id
MAX_LINE_CHARACTERS = 1000
FORMAT = "%(asctime)s %(levelname)s %(processName)s %(message)s"

POOL_LOGGER = "multiprocessing"  # of billiard, which is Celery's own multiprocessing
JOB_IN_LINE = re.compile(r"\bjob=([\da-f]{24})\b")

# At DEBUG these log message bodies, arguments and documents, which hold prompts.
LOGGERS_WITH_CONTENT = (
    *("celery", "kombu", "amqp", "pymongo", "asyncio", "s3fs", "fsspec", "botocore", "urllib3", "PIL"),
    "openai",  # which a handler of the operator's own may use
)
# At INFO these log whole URLs, which may hold passwords.
LOGGERS_WITH_URLS = ("httpx", "httpx2", "httpcore", "httpcore2")
# While Redis or RabbitMQ is away these repeat the same few lines.
LOGGERS_OF_OUTAGES = (
    *("celery.worker.consumer.consumer", "celery.worker.consumer.connection", "celery.worker.request"),
    *("kombu.asynchronous.hub", "kombu.transport.redis", "celery.backends.redis"),
)


class RepeatedFaultLog:
    """Logs a lasting fault once a minute, and once more when it is over."""

    def __init__(self, what: str, level: int = logging.WARNING) -> None:
        self._what, self._level = what, level
        self._next_at = 0.0

    def fault(self, detail: object) -> None:
        if time.monotonic() >= self._next_at:
            logger.log(self._level, "%s: %s (repeats are logged once a minute)", self._what, detail)
            self._next_at = time.monotonic() + REPEAT_AFTER_S

    def over(self) -> None:
        if self._next_at:
            logger.info("%s: over", self._what)
            self._next_at = 0.0


class OnceAMinute:
    """Says of each thing whether a minute has passed since it last was due. It remembers so many of them."""

    MAX_REMEMBERED = 1000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_at: dict[object, float] = {}

    def is_due(self, thing: object) -> bool:
        now = self._clock()
        if now < self._next_at.get(thing, 0.0):
            return False
        if len(self._next_at) >= self.MAX_REMEMBERED:
            self._next_at.clear()
        self._next_at[thing] = now + REPEAT_AFTER_S
        return True


class OncePerCause(OnceAMinute):
    """Leaves an ERROR of one cause at that level once a minute; the same cause's other lines become INFO meanwhile."""

    def level(self, level: int, cause: str) -> int:
        return logging.INFO if level >= logging.ERROR and not self.is_due(cause) else level


def place_of(error: BaseException) -> str:
    """File and line where an exception was raised; for a syntax error, where the faulty line stands."""
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or '?').name}:{error.lineno}"
    place, trace = "?", error.__traceback__
    while trace:
        if not (file := trace.tb_frame.f_code.co_filename).startswith("<"):  # Python's frozen modules have no file
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


class LibraryNoiseFilter(logging.Filter):
    """Lets each kind of line (logger and template) pass once a minute, reduced to its first line.

    The lines behind the first one hold message bodies and stack traces, so only the place of an exception is kept.
    A line that names a single task always passes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._kinds = OnceAMinute(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        template = str(record.msg)
        if TASK_IN_TEMPLATE not in template and not self._kinds.is_due((record.name, template)):
            return False
        error = record.exc_info and record.exc_info[1]
        place = f" ({type(error).__name__} at {place_of(error)})" if error else ""
        line = record.getMessage().strip().partition("\n")[0]
        record.msg, record.args, record.exc_info = line + place, None, None
        return True


def without_reject(record: logging.LogRecord) -> bool:
    """Makes an INFO line out of a `Reject`: the worker gives messages back by it, so that it is no error."""
    if record.exc_info and isinstance(record.exc_info[1], Reject):
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True


def on_one_line(record: logging.LogRecord) -> bool:
    """Escapes control characters, with which a message or document could forge a line, and cuts long lines."""
    try:
        text = record.getMessage()
    except Exception:  # a wrong format string must not raise here, since it wouldn't raise without this filter
        text = str(record.msg)
    text = text.strip()[:MAX_LINE_CHARACTERS]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    record.msg, record.args = text, None
    return True


def json_line(level: str, message: str, fields: Mapping[str, Any] | None = None, at: float | None = None) -> str:
    """A line of the log as a JSON object. `at` is its time in seconds since 1970, by default now."""
    time_text = datetime.fromtimestamp(time.time() if at is None else at, UTC).isoformat(timespec="milliseconds")
    line = {"time": time_text, "level": level, **(fields or {}), "message": message}
    return json.dumps(line, default=str)  # in ASCII alone, which each terminal and each reader of logs takes


def lone_line(level: str, message: str, log_format: str) -> str:
    """A line in the format of the log, for where there is no log yet or any more."""
    return f"{json_line(level, message) if log_format == 'json' else message}\n"


class JsonFormatter(logging.Formatter):
    """Writes each line as a JSON object: time (UTC), level, process, message, and what the line has besides its text.

    A line that names a job has the job's id as `job`. A line about an attempt has more, in `fields` of its record.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        fields = {"process": record.processName, "logger": record.name}
        fields |= {"job": found[1]} if (found := JOB_IN_LINE.search(message)) else {}
        own = as_mapping(getattr(record, "fields", None))  # another library's may be anything
        fields |= {name: value for name, value in own.items() if value is not None}
        fields |= {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return json_line(record.levelname, message, fields, record.created)


def is_worth_a_warning(record: logging.LogRecord) -> bool:
    """Whether a Python warning concerns the operator; Celery's own pending deprecations don't."""
    return "CPendingDeprecation" not in record.getMessage()


def install(debug: bool, handlers: Iterable[logging.Handler], log_format: str = "text") -> None:
    """Sets up logging once Celery has made its handlers. `debug` makes the worker's own lines more detailed.

    `log_format` is `text` or `json`. Celery makes handlers twice, so this is called twice. Those of its pool's logger,
    which says that a process was killed, it hands to nobody.
    """
    for handler in (*handlers, *logging.getLogger(POOL_LOGGER).handlers):
        handler.addFilter(on_one_line)
        if log_format == "json":
            handler.setFormatter(JsonFormatter())
    for name in LOGGERS_WITH_CONTENT:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in LOGGERS_WITH_URLS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").addFilter(without_reject)
    noise = LibraryNoiseFilter()
    for name in LOGGERS_OF_OUTAGES:
        if not any(isinstance(one, LibraryNoiseFilter) for one in logging.getLogger(name).filters):
            logging.getLogger(name).addFilter(noise)
    logging.getLogger("py.warnings").addFilter(is_worth_a_warning)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
