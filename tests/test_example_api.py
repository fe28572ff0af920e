"""The API of examples/: what it does with documents and messages, and what its pages are sent while jobs run."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pymongo
import pytest
import redis
from bson import ObjectId
from celery import Celery
from fastapi.testclient import TestClient

from examples.api import live as live_module
from examples.api.app import USER_ID, create_app
from examples.api.jobs import BUSY, CANCELLED, Jobs, shown
from examples.api.live import Live
from testbed.api import PROGRESS_CHANNEL, STATUS_CHANNEL, TASK_NAME, Api, message_of
from testbed.processes import SOURCE
from testbed.servers import RedisServer
from tests.lab import AUDIO, IMAGE, NOWHERE, SECRET, TEXT, table
from tests.site import run_python, running

Document = dict[str, Any]
SOME_JOB = {"job_type": TEXT, "input_data": {"prompt": "Hello"}}
SOME_ID = "0123456789abcdef01234567"


# ── documents and messages ───────────────────────────────────────────────────────────────────────────────────────


class Person:
    """Someone with a page of their own, and so with a session of their own."""

    def __init__(self, app: Any) -> None:
        self._client = TestClient(app, raise_server_exceptions=False)
        self._client.get("/")
        self.owner = {"user_id": USER_ID, "session_id": self._client.cookies["example_session"]}

    def post(self, path: str, body: object = None) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._client.post(f"/api/jobs{path}", content=json.dumps(body), headers=headers)

    def submit(self, job: Document | None = None) -> Any:
        return self.post("", job or SOME_JOB)


NewPerson = Callable[[], Person]


@pytest.fixture
def new_person(api: Api) -> NewPerson:
    app = create_app(api.database, api.redis_url, api.celery, api.queue)
    return lambda: Person(app)


@pytest.fixture
def person(new_person: NewPerson) -> Person:
    return new_person()


def jobs_of(api: Api, person: Person) -> list[Document]:
    return list(api.jobs.find(person.owner))


def job_of(api: Api, person: Person) -> Document:
    [job] = jobs_of(api, person)
    return job


def insert(api: Api, person: Person, **fields: object) -> ObjectId:
    return api.insert(TEXT, {"prompt": "Hello"}, **{**person.owner, **fields})


def messages(api: Api) -> list[tuple[str, Any]]:
    """The task and the arguments of each message in the queue."""
    waiting: Any = api.redis.lrange(api.queue, 0, -1)
    parsed = [json.loads(message) for message in waiting]
    return [(each["headers"]["task"], json.loads(base64.b64decode(each["body"]))[0]) for each in parsed]


def sentence(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["detail"]


@table(
    "job",
    ("a text", {"job_type": TEXT, "input_data": {"prompt": "Hello", "max_tokens": 20}}),
    ("a picture", {"job_type": IMAGE, "input_data": {"prompt": "A city", "size": "512x512"}}),
    ("a sound", {"job_type": AUDIO, "input_data": {"text": "Hello", "voice": "default"}}),
    ("an input that only the worker judges", {"job_type": TEXT, "input_data": {"prompt": 7, "x": [None]}}),
)
def test_a_job_is_inserted_and_sent_as_the_contract_says(api: Api, person: Person, job: Document) -> None:
    assert person.submit(job).status_code == 204
    document = job_of(api, person)
    assert {name: document[name] for name in job} == job
    assert (document["status"], document["output_data"], "worker" in document) == ("pending", None, False)
    assert messages(api) == [(TASK_NAME, list(message_of(document)))]


def test_the_document_is_there_before_the_message_is_sent(api: Api) -> None:
    statuses: list[str] = []
    celery = Mock(spec=Celery)
    celery.send_task = lambda name, args, **_: statuses.append(api.status(ObjectId(args[0])))
    assert Person(create_app(api.database, api.redis_url, celery, api.queue)).submit().status_code == 204
    assert statuses == ["pending"]


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_a_second_active_job_is_refused_with_a_sentence(api: Api, person: Person, status: str) -> None:
    insert(api, person, status=status)
    assert sentence(person.submit()) == (409, BUSY)
    assert (job_of(api, person)["status"], messages(api)) == (status, [])


def test_active_jobs_of_other_sessions_and_jobs_that_have_ended_are_no_hindrance(
    api: Api, person: Person, new_person: NewPerson
) -> None:
    insert(api, person, status="completed")
    insert(api, person, status="failed")
    insert(api, new_person(), status="processing")
    assert person.submit().status_code == 204


def test_of_requests_at_the_same_time_one_goes_on_at_most(api: Api, new_person: NewPerson) -> None:
    for _ in range(5):
        person, sent_before = new_person(), len(messages(api))
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _, each=person: each.submit(), range(6)))
        accepted = [answer for answer in answers if answer.status_code == 204]
        assert {sentence(answer) for answer in answers if answer not in accepted} <= {(409, BUSY)}
        assert len(accepted) == len(jobs_of(api, person)) == len(messages(api)) - sent_before <= 1


def test_an_index_of_the_database_may_keep_that_rule_too(
    api: Api, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = {"status": {"$in": ["pending", "processing"]}}
    api.jobs.create_index({"user_id": 1, "session_id": 1}, unique=True, partialFilterExpression=active)
    monkeypatch.setattr(Jobs, "_check_free", lambda *_: None)  # as for a request that comes at the same moment
    ended = insert(api, person, status="failed")
    assert person.submit().status_code == 204
    assert sentence(person.submit()) == sentence(person.post(f"/{ended}/retry")) == (409, BUSY)
    assert (len(jobs_of(api, person)), api.status(ended), len(messages(api))) == (2, "failed", 1)


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_a_job_is_cancelled_in_its_document_alone(api: Api, person: Person, status: str) -> None:
    job = insert(api, person, status=status)
    assert person.post(f"/{job}/cancel").status_code == 204
    document = api.document(job)
    assert (document["status"], document["error_message"]) == ("failed", CANCELLED)


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_job_that_has_ended_cant_be_cancelled(api: Api, person: Person, status: str) -> None:
    job = insert(api, person, status=status, error_message="Why.")
    assert sentence(person.post(f"/{job}/cancel")) == (409, "This job has ended already.")
    document = api.document(job)
    assert (document["status"], document["error_message"]) == (status, "Why.")


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_job_that_has_ended_can_be_tried_again(api: Api, person: Person, status: str) -> None:
    job = insert(api, person, status=status, error_message="Why.", worker={"owner": "someone"})
    assert person.post(f"/{job}/retry").status_code == 204
    document = api.document(job)
    assert (document["status"], document["error_message"]) == ("pending", "Why.")
    assert document["worker"] == {"owner": "someone"}
    assert messages(api) == [(TASK_NAME, list(message_of(document)))]


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_a_job_that_has_not_ended_cant_be_tried_again(api: Api, person: Person, status: str) -> None:
    job = insert(api, person, status=status)
    assert sentence(person.post(f"/{job}/retry")) == (409, "This job hasn't ended yet.")
    assert (api.status(job), messages(api)) == (status, [])


def test_a_job_cant_be_tried_again_while_another_one_is_active(api: Api, person: Person) -> None:
    job = insert(api, person, status="failed", error_message="Why.")
    insert(api, person)
    assert sentence(person.post(f"/{job}/retry")) == (409, BUSY)
    document = api.document(job)
    assert (document["status"], document["error_message"], messages(api)) == ("failed", "Why.", [])


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_only_the_session_of_a_job_can_change_it(api: Api, person: Person, new_person: NewPerson, action: str) -> None:
    jobs = [insert(api, person, status=status) for status in ("pending", "failed")]
    for job_id in (*jobs, SOME_ID, "no-id", '{"$ne":1}'):
        assert sentence(new_person().post(f"/{job_id}/{action}")) == (404, "There is no such job.")
    assert [api.status(job) for job in jobs] == ["pending", "failed"]


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def without_queue(api: Api) -> Person:
    celery = Celery(broker=f"redis://{NOWHERE}/0", set_as_current=False)
    return Person(create_app(api.database, api.redis_url, celery, api.queue))


def test_a_job_whose_message_cant_be_sent_is_taken_back(api: Api, without_queue: Person) -> None:
    status, words = sentence(without_queue.submit())
    assert (status, "queue can't be reached" in words) == (503, True)
    assert jobs_of(api, without_queue) == []


def test_a_job_that_cant_be_tried_again_now_stays_as_it_was(api: Api, without_queue: Person) -> None:
    job = insert(api, without_queue, status="failed", error_message="Why.")
    assert without_queue.post(f"/{job}/retry").status_code == 503
    document = api.document(job)
    assert (document["status"], document["error_message"]) == ("failed", "Why.")


def test_a_database_that_is_away_is_answered_by_a_sentence(api: Api) -> None:
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=100) as away:
        person = Person(create_app(away["away"], api.redis_url, api.celery, api.queue))
        for answer in (person.submit(), person.post(f"/{SOME_ID}/cancel"), person.post(f"/{SOME_ID}/retry")):
            assert sentence(answer) == (503, "The database can't be reached. Please try again in a minute.")


@table(
    "input_data",
    ("a document of over 16 MB", {"prompt": "x" * 17_000_000}),
    ("a number of over 64 bits", {"prompt": 2**70}),
    ("half a character", {"prompt": "\ud800"}),
    ("a name with a null", {"a\0b": 1}),
)
def test_what_mongodb_cant_store_is_refused_with_a_sentence(api: Api, person: Person, input_data: Document) -> None:
    status, words = sentence(person.submit({"job_type": TEXT, "input_data": input_data}))
    assert (status, words.startswith("This input is too large")) == (422, True)
    assert jobs_of(api, person) == []


def test_a_page_is_given_a_session_once(api: Api) -> None:
    client = TestClient(create_app(api.database, api.redis_url, api.celery, api.queue))
    [cookie] = client.get("/").headers.get_list("set-cookie")
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert "set-cookie" not in client.get("/").headers


def test_without_a_session_nothing_is_answered(api: Api) -> None:
    client = TestClient(create_app(api.database, api.redis_url, api.celery, api.queue))
    assert client.post("/api/jobs", json=SOME_JOB).status_code == 422
    assert client.get("/api/events").status_code == 422


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def run_example(environment: dict[str, str], folder: Path, *options: str) -> tuple[int, str]:
    """Runs `python -m examples.api`, which ends at once with a fault."""
    ended = run_python(environment, folder, "-m", "examples.api", *options)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


@table(
    "variable, url, code, named",
    ("MongoDB is away", "MONGODB_URL", f"mongodb://u:{SECRET}@{NOWHERE}/x", 1, "MongoDB can't be reached"),
    ("Redis is away", "REDIS_URL", f"redis://:{SECRET}@{NOWHERE}/0", 1, "Redis can't be reached"),
    ("it isn't a URL", "MONGODB_URL", SECRET, 2, "MONGODB_URL"),
)
def test_a_server_that_is_away_is_named_without_its_password(
    environment: dict[str, str], tmp_path: Path, variable: str, url: str, code: int, named: str
) -> None:
    variables = {**environment, variable: url}
    exit_code, errors = run_example(variables, tmp_path, "--servers", "--port", "0")
    assert (exit_code, named in errors, variable in errors, SECRET in errors) == (code, True, True, False)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        exit_code, errors = run_example({}, tmp_path, "--port", port)
    assert (exit_code, f"port {port}: Address already in use. See --host and --port." in errors) == (1, True)


def test_the_api_itself_imports_no_code_of_the_worker() -> None:
    """Everything but the command that starts it: it is what is copied."""
    names = [path.stem for path in (SOURCE / "examples" / "api").glob("*.py") if path.stem != "__main__"]
    imports = "".join(f"import examples.api.{name}\n" for name in names if name != "__init__")
    look = f"import sys\n{imports}print({{name.partition('.')[0] for name in sys.modules}})"
    ended = subprocess.run([sys.executable, "-c", look], cwd=SOURCE, capture_output=True, text=True, check=True)
    assert "examples" in ended.stdout
    assert not {"worker", "workerkit", "worker_commands"} & ast.literal_eval(ended.stdout)


# ── what a page shows ────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "fields, sentence",
    ("a new job", {"status": "pending"}, "Waiting for its turn."),
    ("one that has begun", {"status": "processing", "worker": {"message": "It started."}}, "It started."),
    ("one that waits", {"status": "processing", "worker": {"message": "Busy; in 5 s."}}, "Busy; in 5 s."),
    ("one of an older worker", {"status": "processing"}, "In progress."),
    ("odd bookkeeping", {"status": "processing", "worker": ["x"]}, "In progress."),
    ("the end", {"status": "completed", "worker": {"message": "Done."}}, "Done."),
    ("a failure", {"status": "failed", "error_message": "Why.", "worker": {"message": "Why."}}, "Why."),
    ("a cancel", {"status": "failed", "error_message": CANCELLED, "worker": {"message": "It started."}}, CANCELLED),
    ("tried again", {"status": "pending", "worker": {"message": "Why."}}, "Waiting for its turn."),
    ("a failure without a sentence", {"status": "failed"}, "This has failed."),
)
def test_a_page_shows_the_last_sentence(fields: Document, sentence: str) -> None:
    empty = {"_id": ObjectId(), "job_type": TEXT, "input_data": {}, "output_data": None, "error_message": None}
    assert shown({**empty, **fields})["sentence"] == sentence


# ── live updates ─────────────────────────────────────────────────────────────────────────────────────────────────

OWNER = {"user_id": USER_ID, "session_id": "some-session"}
PATIENCE_S = 30.0


class Stage:
    """A live API on a Redis, some documents, and the worker that publishes."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url, self._redis = redis_url, redis.Redis.from_url(redis_url)
        self.documents: dict[str, Document] = {}
        self.live = Live(redis_url, lambda owner: dict(self.documents) if owner == OWNER else {})

    def publish(self, channel: str, message: object) -> int:
        data = message if isinstance(message, bytes) else json.dumps(message)
        return int(self._redis.publish(channel, data))

    def set_status(self, job_id: str, status: str, **fields: object) -> None:
        self.documents[job_id] = {"id": job_id, "status": status, **fields}
        self.publish(STATUS_CHANNEL, {"type": "job_status_update", **OWNER, "job_id": job_id, "status": status})

    def write(self, job_id: str, attempt: int, sequence: int, delta: str) -> int:
        where = {"job_id": job_id, "attempt": attempt, "sequence": sequence}
        return self.publish(PROGRESS_CHANNEL, {"type": "job_progress", **OWNER, **where, "delta": delta})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        listening = asyncio.create_task(self.live.listen())
        await until(lambda: self.publish(STATUS_CHANNEL, {}) and self.publish(PROGRESS_CHANNEL, {}))
        yield self
        listening.cancel()

    def open_page(self, owner: Document = OWNER) -> Page:
        return Page(self.live, owner)


class Page:
    """What the script of page.html does with the events, as far as texts and statuses go."""

    def __init__(self, live: Live, owner: Document) -> None:
        self.jobs: dict[str, Document] = {}
        self.texts: dict[str, str] = {}
        self.seen: list[str] = []  # each text that was ever shown
        self._task = asyncio.create_task(self._follow(live.stream(owner)))

    async def _follow(self, stream: AsyncIterator[str]) -> None:
        async for event in stream:
            name, data = event.partition("\n")[0].removeprefix("event: "), event.partition("\ndata: ")[2]
            if name == "jobs":
                self.jobs.update({job["id"]: job for job in json.loads(data)["changed"]})
                self.texts.update({job: "" for job in self.jobs if self.jobs[job]["status"] != "processing"})
            elif name == "text":
                piece = json.loads(data)
                before = "" if piece["begins"] else self.texts.get(piece["id"], "")
                self.texts[piece["id"]] = before + piece["text"]
                self.seen.append(self.texts[piece["id"]])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def play(redis_url: str, scene: Callable[[Stage], Awaitable[None]]) -> None:
    """Runs a scene on a stage whose API listens."""

    async def run() -> None:
        async with Stage(redis_url).running() as stage:
            await scene(stage)

    asyncio.run(run())


def test_a_page_that_is_loaded_in_mid_job_gets_the_text_so_far_and_then_the_rest(fake_redis_url: str) -> None:
    pieces = [f"{number} " for number in range(300)]
    whole, dice = "".join(pieces), random.Random(7)

    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        pages = [stage.open_page()]
        for sequence, piece in enumerate(pieces):
            stage.write("a", 1, sequence, piece)
            if dice.random() < 0.3:
                pages.append(stage.open_page())
            if dice.random() < 0.7:
                await asyncio.sleep(dice.choice((0, 0, 0.001, 0.004)))
        await until(lambda: all(page.texts.get("a") == whole for page in pages))
        assert all(whole.startswith(text) for page in pages for text in page.seen)
        assert len({page.seen[0] for page in pages}) > 20  # they began at many different places

    play(fake_redis_url, scene)


def test_a_new_attempt_begins_the_text_anew(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        stage.write("a", 1, 0, "Half a ")
        stage.write("a", 1, 1, "text")
        await until(lambda: page.texts.get("a") == "Half a text")
        stage.set_status("a", "processing", sentence="Trying again.")
        await until(lambda: page.texts["a"] == "")
        stage.write("a", 2, 0, "A whole ")
        stage.write("a", 2, 1, "text")
        await until(lambda: page.texts["a"] == "A whole text")

    play(fake_redis_url, scene)


def test_a_piece_that_comes_again_with_more_in_it_takes_the_place_of_the_first(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        pieces = [(0, "One "), (0, "One two "), (1, "three "), (1, "three "), (1, "three four "), (2, "five")]
        for sequence, piece in pieces:
            stage.write("a", 1, sequence, piece)
            await until(partial(lambda end: page.texts.get("a", "").endswith(end), piece))
        assert page.texts["a"] == "One two three four five"

    play(fake_redis_url, scene)


def test_an_attempt_that_begins_anew_under_its_number_takes_the_place_of_the_first(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        for sequence, piece in ((0, "One "), (1, "two "), (0, "Uno "), (1, "dos")):
            stage.write("a", 1, sequence, piece)
        await until(lambda: page.texts.get("a") == "Uno dos")

    play(fake_redis_url, scene)


def test_late_pieces_of_a_former_attempt_or_life_are_not_mixed_in(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        for sequence in range(3):
            stage.write("a", 2, sequence, "old ")
        await until(lambda: page.texts.get("a") == "old old old ")
        stage.set_status("a", "pending")  # cancelled and tried again; its attempts are counted anew
        stage.set_status("a", "processing")
        stage.write("a", 2, 3, "old ")
        stage.write("a", 1, 0, "new ")
        stage.write("a", 2, 4, "old ")
        stage.write("a", 1, 1, "text")
        await until(lambda: page.texts["a"] == "new text")
        assert not any("old" in text and "new" in text for text in page.seen)

    play(fake_redis_url, scene)


def test_behind_a_gap_nothing_is_added_and_the_document_has_the_whole_at_the_end(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        stage.set_status("b", "processing")
        page = stage.open_page()
        stage.write("a", 1, 0, "One ")
        stage.write("a", 1, 2, "three ")
        stage.write("a", 1, 3, "four")
        stage.write("b", 1, 0, "what came later")
        await until(lambda: page.texts.get("b") == "what came later")
        assert page.texts["a"] == "One "
        stage.set_status("a", "completed", text="One two three four")
        await until(lambda: page.jobs["a"]["status"] == "completed")
        assert page.jobs["a"]["text"] == "One two three four"

    play(fake_redis_url, scene)


def test_an_api_that_was_restarted_in_mid_job_shows_the_sentence_and_at_the_end_the_whole(fake_redis_url: str) -> None:
    async def before(stage: Stage) -> None:
        stage.set_status("a", "processing")
        stage.write("a", 1, 0, "One ")

    async def after(stage: Stage) -> None:
        stage.documents["a"] = {"id": "a", "status": "processing", "sentence": "Your job has started."}
        page = stage.open_page()
        stage.write("a", 1, 1, "two ")
        await until(lambda: page.jobs and page.jobs["a"]["sentence"] == "Your job has started.")
        stage.write("a", 1, 2, "three")
        stage.set_status("a", "completed", text="One two three")
        await until(lambda: page.jobs["a"]["status"] == "completed")
        assert (page.seen, page.jobs["a"]["text"]) == ([], "One two three")

    play(fake_redis_url, before)
    play(fake_redis_url, after)


def test_a_page_is_sent_only_its_own_sessions_jobs_and_texts(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        strangers = [{**OWNER, "session_id": "another"}, {**OWNER, "user_id": "another"}]
        pages = [stage.open_page(stranger) for stranger in strangers]
        own_page = stage.open_page()
        stage.write("a", 1, 0, "Secret")
        await until(lambda: own_page.texts.get("a") == "Secret")
        assert [(page.jobs, page.seen) for page in pages] == [({}, [])] * 2

    play(fake_redis_url, scene)


def test_messages_of_another_form_are_ignored(fake_redis_url: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        odd: list[Any] = [None, 7, "x", [], {}, {"type": "job_progress"}, {"type": "job_status_update", "job_id": "a"}]
        odd += [b"\xff no JSON", {"type": "another", **OWNER, "job_id": "a", "delta": "x"}]
        for message in odd:
            stage.publish(STATUS_CHANNEL, message)
            stage.publish(PROGRESS_CHANNEL, message)
        stage.write("a", 1, 0, "Text")
        await until(lambda: page.texts.get("a") == "Text")

    play(fake_redis_url, scene)


def test_a_notification_that_was_missed_is_made_up_for_by_a_look_at_the_document(
    fake_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "READ_EVERY_S", 0.05)

    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        await until(lambda: page.jobs)
        stage.documents["a"] = {"id": "a", "status": "completed"}
        await until(lambda: page.jobs["a"]["status"] == "completed")

    play(fake_redis_url, scene)


def test_what_is_kept_of_texts_and_pages_is_bounded(fake_redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "KEPT_TEXTS", 10)

    async def scene(stage: Stage) -> None:
        stage.set_status("a", "processing")
        page = stage.open_page()
        for number in range(100):
            stage.write(f"job-{number}", 1, 0, "x")
        stage.write("a", 1, 0, "Text")
        await until(lambda: page.texts.get("a") == "Text")
        assert len(stage.live._texts) == 10
        stage.set_status("a", "completed")
        await until(lambda: "a" not in stage.live._texts)
        await page.close()
        await until(lambda: not stage.live._pages)

    play(fake_redis_url, scene)


@pytest.mark.servers
def test_live_updates_go_on_when_redis_is_back() -> None:
    with running(RedisServer()) as server:

        async def scene(stage: Stage) -> None:
            stage.set_status("a", "processing")
            page = stage.open_page()
            stage.write("a", 1, 0, "One ")
            await until(lambda: page.texts.get("a") == "One ")
            server.restart(crash=True)
            stage.documents["b"] = {"id": "b", "status": "processing"}  # nobody hears of that
            await until(lambda: "b" in page.jobs)
            # A worker, too, sends a piece again that nobody received.
            await until(lambda: stage.write("b", 1, 0, "Text") and page.texts.get("b") == "Text")

        play(server.url, scene)
