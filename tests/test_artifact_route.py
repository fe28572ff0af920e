"""The route of examples/ for files in GridFS: whole files, parts of them, and what browsers have already."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import mongomock
import pymongo
import pytest
from bson import ObjectId
from fastapi import FastAPI
from gridfs import GridFS
from mongomock.gridfs import enable_gridfs_integration
from pymongo.database import Database

from examples.artifact_route import PIECE_BYTES, add_artifacts, pieces
from testbed.servers import MongoServer
from tests.lab import PNG, bare_settings, table
from workerkit.artifacts import Artifacts, open_artifacts

Documents = Database[dict[str, Any]]
Ask = Callable[..., httpx.Response]

SOUND = random.Random(1).randbytes(3 * PIECE_BYTES + 1000)
LENGTH = len(SOUND)


@pytest.fixture(scope="module", params=[pytest.param("mongod", marks=pytest.mark.servers), "mongomock"])
def database(request: pytest.FixtureRequest) -> Iterator[Documents]:
    if request.param == "mongomock":
        enable_gridfs_integration()  # type: ignore[no-untyped-call]
        yield mongomock.MongoClient()["artifact_route"]
        return
    mongo_server: MongoServer = request.getfixturevalue("mongo_server")
    with pymongo.MongoClient[dict[str, Any]](mongo_server.url) as client:
        database = client[f"test_artifact_route_{ObjectId()}"]
        yield database
        client.drop_database(database)


@pytest.fixture(scope="module")
def artifacts(database: Documents) -> Artifacts:
    """The worker's store, with a picture `a.png` and a sound `a.wav` of several chunks."""
    settings = bare_settings()
    artifacts = open_artifacts(
        settings.artifact_store_url, settings.artifact_base_url, lambda: database, settings.s3_options
    )
    artifacts.publish("a.png", PNG)
    artifacts.publish("a.wav", SOUND)
    return artifacts


@pytest.fixture(scope="module")
def ask(database: Documents, artifacts: Artifacts) -> Ask:
    """Sends a request to an API that has the route, with these headers: `if_range` stands for `If-Range`."""
    add_artifacts(app := FastAPI(), database)

    async def send(name: str, method: str, headers: list[tuple[bytes, bytes]]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
            return await client.request(method, f"/artifacts/{name}", headers=headers)

    def ask(name: str, method: str = "GET", **headers: str) -> httpx.Response:
        encoded = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
        return asyncio.run(send(name, method, encoded))

    return ask


# ── whole files ──────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "name, data, content_types",
    ("a picture", "a.png", PNG, {"image/png"}),
    ("a sound of several chunks", "a.wav", SOUND, {"audio/wav", "audio/x-wav"}),
)
def test_a_file_is_served_as_what_it_is(ask: Ask, name: str, data: bytes, content_types: set[str]) -> None:
    answer = ask(name)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] in content_types
    assert answer.headers["content-length"] == str(len(data))


def test_browsers_keep_files_run_none_of_them_and_know_that_they_may_ask_for_parts(ask: Ask) -> None:
    headers = ask("a.png").headers
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["accept-ranges"] == "bytes"


@table("name", ("no such file", "x.png"), ("an operator is a name like any other", '{"$ne":1}'))
def test_what_is_not_there_is_answered_404(ask: Ask, name: str) -> None:
    assert ask(name).status_code == ask(name, "HEAD").status_code == ask(name, Range="bytes=0-1").status_code == 404


def test_head_has_the_headers_of_get_and_no_body(ask: Ask) -> None:
    head, get = ask("a.wav", "HEAD"), ask("a.wav")
    assert (head.status_code, head.content, dict(head.headers)) == (200, b"", dict(get.headers))


def test_other_methods_are_refused(ask: Ask) -> None:
    assert ask("a.wav", "POST").status_code == ask("a.wav", "DELETE").status_code == 405


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "wanted, part",
    ("what Safari asks first", "bytes=0-1", range(2)),
    ("from the start", "bytes=0-", range(LENGTH)),
    ("in the middle", "bytes=1000-1999", range(1000, 2000)),
    ("one byte", "bytes=7-7", range(7, 8)),
    ("over the end of a chunk", f"bytes={PIECE_BYTES - 5}-{PIECE_BYTES + 5}", range(PIECE_BYTES - 5, PIECE_BYTES + 6)),
    ("several chunks", f"bytes=5-{2 * PIECE_BYTES + 7}", range(5, 2 * PIECE_BYTES + 8)),
    ("to the end", f"bytes={LENGTH - 10}-", range(LENGTH - 10, LENGTH)),
    ("beyond the end", f"bytes={LENGTH - 10}-{LENGTH + 999}", range(LENGTH - 10, LENGTH)),
    ("the last bytes", "bytes=-500", range(LENGTH - 500, LENGTH)),
    ("more last bytes than there are", f"bytes=-{LENGTH + 1}", range(LENGTH)),
    ("the unit in capitals", "Bytes=0-1", range(2)),
)
def test_a_part_is_answered_206(ask: Ask, wanted: str, part: range) -> None:
    answer = ask("a.wav", Range=wanted)
    assert (answer.status_code, answer.content) == (206, SOUND[part.start : part.stop])
    assert answer.headers["content-range"] == f"bytes {part.start}-{part.stop - 1}/{LENGTH}"
    assert answer.headers["content-length"] == str(len(part))
    assert answer.headers["content-type"] == ask("a.wav").headers["content-type"]


@table(
    "wanted",
    ("behind the end", f"bytes={LENGTH}-"),
    ("far behind the end", "bytes=99999999-100000000"),
    ("the last 0 bytes", "bytes=-0"),
)
def test_a_part_that_is_not_there_is_answered_416_with_the_length(ask: Ask, wanted: str) -> None:
    answer = ask("a.wav", Range=wanted)
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{LENGTH}")


@table(
    "wanted",
    ("several parts", "bytes=0-1,5-6"),
    ("another unit", "items=0-1"),
    ("its end before its start", "bytes=5-4"),
    ("neither start nor end", "bytes=-"),
    ("no digits", "bytes=a-b"),
    ("other scripts' digits", "bytes=٣-٤"),
    ("a sign", "bytes=--5"),
    ("a number that is longer than any file", f"bytes={'9' * 5000}-"),
    ("nothing", ""),
)
def test_what_is_no_single_part_is_answered_by_the_whole_file(ask: Ask, wanted: str) -> None:
    answer = ask("a.wav", Range=wanted)
    assert (answer.status_code, answer.content) == (200, SOUND)


def test_head_of_a_part_is_that_of_the_whole_file(ask: Ask) -> None:
    answer = ask("a.wav", "HEAD", Range="bytes=0-1")
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(LENGTH))


def test_a_file_is_read_piece_by_piece(database: Documents, artifacts: Artifacts) -> None:
    file = GridFS(database, collection="artifacts").get_last_version("a.wav")
    read = list(pieces(file, range(10, LENGTH)))
    assert [len(piece) for piece in read] == [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES, 990]


# ── what a browser has already ───────────────────────────────────────────────────────────────────────────────────


def test_each_file_has_a_tag_of_its_own_which_stays(ask: Ask) -> None:
    tag = ask("a.wav").headers["etag"]
    assert tag == ask("a.wav", "HEAD").headers["etag"] == ask("a.wav", Range="bytes=0-1").headers["etag"]
    assert tag != ask("a.png").headers["etag"]
    assert tag[0] == tag[-1] == '"'


@table("tags", ("this one", "{tag}"), ("weakly compared", "W/{tag}"), ("among others", '"x", {tag},"y"'), ("any", "*"))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_the_browser_has_is_answered_304(ask: Ask, method: str, tags: str) -> None:
    tag = ask("a.png").headers["etag"]
    answer = ask("a.png", method, If_None_Match=tags.format(tag=tag))
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)


def test_a_part_that_the_browser_has_is_answered_304(ask: Ask) -> None:
    tag = ask("a.wav").headers["etag"]
    assert ask("a.wav", If_None_Match=tag, Range="bytes=0-1").status_code == 304


def test_a_file_that_the_browser_has_in_another_version_is_sent(ask: Ask) -> None:
    assert ask("a.png", If_None_Match='"another"').content == PNG


@table(
    "if_range, status",
    ("the same file", "{tag}", 206),
    ("another file", '"another"', 200),
    ("weak tags don't count", "W/{tag}", 200),
    ("a time", "Wed, 21 Oct 2015 07:28:00 GMT", 200),
)
def test_a_part_is_sent_only_of_the_file_that_the_browser_has(ask: Ask, if_range: str, status: int) -> None:
    tag = ask("a.wav").headers["etag"]
    answer = ask("a.wav", Range="bytes=0-9", If_Range=if_range.format(tag=tag))
    assert (answer.status_code, len(answer.content)) == (status, 10 if status == 206 else LENGTH)
