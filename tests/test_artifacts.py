"""Where files go: GridFS, a folder, S3 and the URL itself; what an attempt deletes."""

from __future__ import annotations

import base64
import errno
import mimetypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gridfs
import pymongo
import pytest
from bson import ObjectId
from pymongo.collection import Collection
from pymongo.database import Database

from testbed.processes import free_port
from testbed.servers import MongoServer
from tests.lab import NOWHERE, PNG, bare_settings, change, claim, some_job, table
from worker import Job, Media, Result, Runtime, complete, discard_files, file_name, remove_leftovers
from workerkit.artifacts import Artifacts, InlineArtifacts, open_artifacts
from workerkit.errors import ArtifactsUnavailable, StoreUnavailable

Documents = Database[dict[str, Any]]

# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real HTTP server that speaks S3, with an empty bucket `pictures`."""
    from moto.server import ThreadedMotoServer  # takes half a second, which each of pytest's processes would spend

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    s3_client(url).create_bucket(Bucket="pictures")
    yield url
    server.stop()


def s3_client(url: str) -> Any:
    import boto3  # type: ignore[import-untyped]  # as above

    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


def s3_settings(url: str, artifact_url: str) -> dict[str, Any]:
    names = {"s3_bucket_name": "pictures", "s3_region": "us-east-1", "s3_endpoint_url": url}
    return {**names, "aws_access_key_id": "key", "aws_secret_access_key": "secret", "artifact_url": artifact_url}


def open_store(database: Callable[[], Documents] = pytest.fail, **values: str) -> Artifacts:
    """The store that these settings name, opened as a worker opens it."""
    settings = bare_settings(**values)
    return open_artifacts(settings.artifact_store_url, settings.artifact_base_url, database, settings.s3_options)


@pytest.fixture
def database(mongo_server: MongoServer) -> Iterator[Documents]:
    with pymongo.MongoClient[dict[str, Any]](mongo_server.url) as client:
        database = client[f"test_artifacts_{ObjectId()}"]
        yield database
        client.drop_database(database)


@pytest.fixture(params=[pytest.param("gridfs", marks=pytest.mark.servers), "file", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    """Every store that keeps files, in turn."""
    if request.param == "gridfs":
        database: Documents = request.getfixturevalue("database")
        return open_store(lambda: database, artifact_url="gridfs")
    if request.param == "s3":
        return open_store(**s3_settings(request.getfixturevalue("s3"), f"s3://pictures/{tmp_path.name}"))
    return open_store(artifact_url=f"file://{tmp_path}/folder")


def names(artifacts: Artifacts, job: Job) -> list[str]:
    return sorted(artifacts.names(f"{job.id}-"))


# ── every store ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_named_by_job_and_owner_under_the_base_url(artifacts: Artifacts) -> None:
    job = some_job()
    assert artifacts.publish(file_name(job, "png"), PNG) == f"/artifacts/{job.id}-owner-1.png"
    assert names(artifacts, job) == [f"{job.id}-owner-1.png"]


def test_a_file_may_be_stored_again(artifacts: Artifacts) -> None:
    job = some_job()
    urls = {artifacts.publish(file_name(job, "png"), PNG) for _ in range(2)}
    assert (len(urls), len(names(artifacts, job))) == (1, 1)


def test_names_are_those_that_begin_with_the_prefix(artifacts: Artifacts) -> None:
    for name in ("a-1.png", "a-2.png", "b-1.png", "a.1.png"):
        artifacts.publish(name, PNG)
    assert sorted(artifacts.names("a-")) == ["a-1.png", "a-2.png"]
    assert sorted(artifacts.names("a.")) == ["a.1.png"]
    assert sorted(artifacts.names()) == ["a-1.png", "a-2.png", "a.1.png", "b-1.png"]


def test_an_empty_store_has_no_names(artifacts: Artifacts) -> None:
    assert list(artifacts.names()) == []


def test_a_deleted_file_is_gone(artifacts: Artifacts) -> None:
    artifacts.publish("a.png", PNG)
    artifacts.delete("a.png")
    assert list(artifacts.names()) == []


def test_a_file_that_is_gone_can_be_removed(artifacts: Artifacts) -> None:
    artifacts.delete(f"{ObjectId()}-owner-1.png")


# ── what an attempt deletes ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def runtime_with(light_runtime: Runtime, artifacts: Artifacts) -> Runtime:
    """A runtime whose files go into each store in turn."""
    light_runtime.artifacts = artifacts
    return light_runtime


def publish_for(runtime: Runtime, *jobs: Job) -> None:
    for job in jobs:
        runtime.artifacts.publish(file_name(job, "png"), PNG)


def test_an_attempt_that_lost_deletes_its_own_files_only(runtime_with: Runtime) -> None:
    job = some_job()
    winner, loser = some_job(id=job.id, owner="winner"), some_job(id=job.id, owner="loser")
    publish_for(runtime_with, winner, loser)
    discard_files(runtime_with, loser)
    assert names(runtime_with.artifacts, job) == [f"{job.id}-winner.png"]


def test_the_winner_deletes_those_of_the_others_and_of_no_other_job(runtime_with: Runtime) -> None:
    job, stranger = claim(runtime_with, owner="winner"), some_job()
    publish_for(runtime_with, job, some_job(id=job.id, owner="loser"), stranger)
    runtime_with.store.complete(job, {}, f"/artifacts/{file_name(job, 'png')}")
    remove_leftovers(runtime_with, replace(job, attempt=2))
    assert names(runtime_with.artifacts, job) == [f"{job.id}-winner.png"]
    assert names(runtime_with.artifacts, stranger) == [f"{stranger.id}-owner-1.png"]


# ── GridFS ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def half_stored(database: Documents) -> Artifacts:
    """GridFS with what is there of `a.png` when a process dies while it stores it: chunks, and no entry."""
    artifacts = open_store(lambda: database)
    artifacts.publish("a.png", PNG)
    database["artifacts.files"].delete_one({"_id": "a.png"})
    database["artifacts.chunks"].update_one({"files_id": "a.png"}, {"$set": {"data": b"half"}})
    return artifacts


def test_a_half_stored_file_in_gridfs_is_replaced(database: Documents, half_stored: Artifacts) -> None:
    half_stored.publish("a.png", PNG)
    assert gridfs.GridFS(database, collection="artifacts").get("a.png").read() == PNG


def test_a_half_stored_file_in_gridfs_has_a_name_and_can_be_deleted(half_stored: Artifacts) -> None:
    assert list(half_stored.names("a")) == ["a.png"]
    half_stored.delete("a.png")
    assert list(half_stored.names("a")) == []


def test_an_attempt_that_lost_while_it_stored_its_file_leaves_nothing_of_it_in_gridfs(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended between the chunks and their index entry, and the winner has deleted the chunks since."""
    loser, bucket = claim(runtime, owner="loser"), runtime.database["artifacts"]
    winner, insert_entry = some_job(id=loser.id, owner="winner", attempt=2), Collection.insert_one

    def insert_late(collection: Collection[Any], *arguments: Any, **options: Any) -> Any:
        change(runtime, loser.id, worker__owner="winner")
        assert runtime.store.complete(winner, {}, None)
        remove_leftovers(runtime, winner)
        monkeypatch.undo()
        return insert_entry(collection, *arguments, **options)

    monkeypatch.setattr(Collection, "insert_one", insert_late)
    assert not complete(runtime, loser, Result({}, Media(PNG, "png", "image_url")))
    assert (bucket["files"].count_documents({}), bucket["chunks"].count_documents({})) == (1, 0)
    discard_files(runtime, loser)
    assert (bucket["files"].count_documents({}), bucket["chunks"].count_documents({})) == (0, 0)


# ── a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "base_url, url",
    ("a path of the API", "/artifacts", "/artifacts/a.txt"),
    ("a slash too many", "https://cdn.example/files/", "https://cdn.example/files/a.txt"),
)
def test_the_base_url_and_the_name_make_the_url(tmp_path: Path, base_url: str, url: str) -> None:
    assert open_store(artifact_url=f"file://{tmp_path}", artifact_base_url=base_url).publish("a.txt", b"x") == url


def test_a_stored_file_can_be_read_by_the_web_server(tmp_path: Path) -> None:
    open_store(artifact_url=f"file://{tmp_path}/new/folder/").publish("a.txt", b"x")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == b"x"
    assert (tmp_path / "new" / "folder" / "a.txt").stat().st_mode & 0o777 == 0o644


@table("temporary", ("the same disk", "."), ("temporary files are on another disk", "/dev/shm"))
def test_a_reader_never_finds_half_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temporary: str) -> None:
    if not Path(temporary).is_dir():
        pytest.skip("there is no other disk")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / temporary))
    artifacts = open_store(artifact_url=f"file://{tmp_path}/files")
    seen, data = set(), bytes(8 * 2**20)

    def read_sizes() -> set[int]:
        return {path.stat().st_size for path in tmp_path.glob("files/*.bin")}

    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(lambda: [artifacts.publish(f"{number}.bin", data) for number in range(10)])
        while not writer.done():
            seen |= read_sizes()
        writer.result()
    assert seen | read_sizes() == {len(data)}


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_s3_takes_the_contracts_names(s3: str) -> None:
    open_store(**s3_settings(s3, "s3://")).publish("a.png", PNG)
    stored = s3_client(s3).get_object(Bucket="pictures", Key="a.png")
    assert (stored["Body"].read(), stored["ContentType"]) == (PNG, "image/png")


def test_s3_shows_what_another_worker_stored_since_the_last_look(s3: str) -> None:
    artifacts = open_store(**s3_settings(s3, "s3://pictures/shared"))
    artifacts.publish("a-own.png", PNG)
    assert (list(artifacts.names()), list(artifacts.names("b"))) == (["a-own.png"], [])
    s3_client(s3).put_object(Bucket="pictures", Key="shared/b-another.png", Body=PNG)
    assert (list(artifacts.names()), list(artifacts.names("b"))) == (["a-own.png", "b-another.png"], ["b-another.png"])


# ── the URL itself ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_inline_artifact_is_its_own_url() -> None:
    artifacts = open_store(artifact_url="data:")
    head, encoded = artifacts.publish("a.png", PNG).split(",")
    assert (head, base64.b64decode(encoded)) == ("data:image/png;base64", PNG)
    assert list(artifacts.names()) == []
    artifacts.delete("x")


@table(
    "suffix, types",
    ("a picture", "png", {"image/png"}),
    ("a photograph", "jpg", {"image/jpeg"}),
    ("unknown to Python 3.11", "webp", {"image/webp"}),
    ("two names are in use", "wav", {"audio/wav", "audio/x-wav"}),
    ("speech", "mp3", {"audio/mpeg"}),
    ("Opus in Ogg", "opus", {"audio/opus", "audio/ogg"}),
    ("unknown to Python 3.11, too", "flac", {"audio/flac", "audio/x-flac"}),
    ("unknown everywhere", "xyz", {"application/octet-stream"}),
)
def test_a_file_has_its_content_type_where_the_system_has_no_table(
    monkeypatch: pytest.MonkeyPatch, suffix: str, types: set[str]
) -> None:
    monkeypatch.setattr(mimetypes, "knownfiles", [])  # as in a slim image
    monkeypatch.setattr(mimetypes, "_db", None)
    monkeypatch.setattr(mimetypes, "inited", False)
    url = InlineArtifacts("").publish(f"a.{suffix}", b"x")
    assert url.removeprefix("data:").split(";")[0] in types


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "values",
    ("a folder below a file", {"artifact_url": f"file://{__file__}/folder"}),
    ("a bucket that isn't there", {"artifact_url": "s3://no-such"}),
    ("an unknown file system", {"artifact_url": "unheard-of://x"}),
    ("GridFS without MongoDB", {"artifact_url": "gridfs"}),
)
def test_a_store_that_cant_be_reached_raises_store_unavailable(s3: str, values: dict[str, str]) -> None:
    with pymongo.MongoClient[dict[str, Any]](f"mongodb://{NOWHERE}", timeoutMS=50) as client:
        artifacts = open_store(lambda: client["away"], **{**s3_settings(s3, ""), **values})
        with pytest.raises(StoreUnavailable):
            artifacts.publish("a.png", PNG)


def test_half_a_file_is_removed_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ArtifactsUnavailable, match="No space left on device"):
        open_store(artifact_url=f"file://{tmp_path}").publish("a.png", PNG)
    assert list(tmp_path.iterdir()) == []


def test_the_reason_is_named_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "planted").write_text("no folder")
    with pytest.raises(ArtifactsUnavailable, match="artifact store: NotADirectoryError Not a directory") as caught:
        open_store(artifact_url=f"file://{tmp_path}/planted/folder").publish("a.png", PNG)
    assert "planted" not in str(caught.value)
