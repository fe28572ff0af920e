"""Where files go: GridFS, a folder, S3 or any file system that fsspec knows, or into the URL itself.

A store knows files by their names only.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import itertools
import mimetypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gridfs

from workerkit.errors import ArtifactsUnavailable, Document
from workerkit.mongodb import unknown_when_unreachable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from pymongo.database import Database

NAMES_AT_ONCE = 1000  # MongoDB would send 16 MB of them, which take five times that in memory

CONTENT_TYPES = {  # slim images have no mime.types, and Python's own table lacks some of these
    **{"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"},
    **{"wav": "audio/wav", "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac"},
}


class Artifacts:
    """A store of files. Each kind has its own `put`, `names` and `delete`.

    All methods raise ArtifactsUnavailable; those of GridFS raise StoreUnavailable and StoreRefused.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        """Stores a file whole or not at all. Returns its URL, or None where that is the base URL and the name."""
        raise NotImplementedError

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names of stored files that begin with the prefix."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Deletes a file; nothing happens if there is none."""
        raise NotImplementedError

    def publish(self, name: str, data: bytes) -> str:
        """Stores a file and returns its public URL. It is safe to repeat this."""
        suffix = name.rsplit(".", 1)[-1]
        content_type = CONTENT_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        return self.put(name, data, content_type) or f"{self.base_url}/{name}"


class GridFSArtifacts(Artifacts):
    """Files beside the jobs in MongoDB (collections `artifacts.files` and `artifacts.chunks`)."""

    def __init__(self, database: Database[Document], base_url: str) -> None:
        super().__init__(base_url)
        self._bucket = gridfs.GridFS(database, collection="artifacts")
        self._index, self._chunks = database["artifacts.files"], database["artifacts.chunks"]

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        with unknown_when_unreachable():
            try:
                self._bucket.put(data, _id=name, filename=name, metadata={"contentType": content_type})
            except gridfs.errors.FileExists:  # left by an earlier try at this put
                # GridFS writes the index entry last. If it is there, the file is whole and the document may name it
                # already, so it must not be gone even for a moment.
                if self._index.find_one({"_id": name}, {"_id": 1}):
                    return None
                self._bucket.delete(name)
                self._bucket.put(data, _id=name, filename=name, metadata={"contentType": content_type})
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        """Found by their chunks and by their index entries, since only one of these may be left of a file.

        Chunks alone: a process died while it stored or deleted it. An entry alone: a process was suspended while it
        stored it, and wrote the entry after another one had deleted the chunks.
        """
        begins = {"$regex": f"^{re.escape(prefix)}"}
        with unknown_when_unreachable():  # both reads are answered by an index alone, in its order
            chunks = self._chunks.find({"files_id": begins}, {"_id": 0, "files_id": 1}).sort("files_id")
            entries = self._index.find({"_id": begins}, {"_id": 1}).sort("_id")
            by_chunk = (chunk["files_id"] for chunk in chunks.batch_size(NAMES_AT_ONCE))
            by_entry = (entry["_id"] for entry in entries.batch_size(NAMES_AT_ONCE))
            yield from (name for name, _ in itertools.groupby(heapq.merge(by_chunk, by_entry)))

    def delete(self, name: str) -> None:
        with unknown_when_unreachable():
            self._bucket.delete(name)


@contextlib.contextmanager
def unavailable_when_files_fail() -> Iterator[None]:
    """Turns every error of a file system into ArtifactsUnavailable. S3 clients raise others besides OSError, too."""
    try:
        yield
    except Exception as error:
        what = getattr(error, "strerror", None)  # it doesn't name the path
        raise ArtifactsUnavailable(f"artifact store: {type(error).__name__} {what or ''}".strip()) from error


class FolderArtifacts(Artifacts):
    """Files in a folder (`file://`). Each is written under another name first, so that no reader sees half of it."""

    def __init__(self, folder: Path, base_url: str) -> None:
        super().__init__(base_url)
        self._folder = folder

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        part = self._folder / f"{name}.part"
        with unavailable_when_files_fail():
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # after a power cut the document that names the file is still there
                part.chmod(0o644)  # the web server in front runs as another user
                part.replace(self._folder / name)
            except OSError:
                part.unlink(missing_ok=True)  # half a file would fill a full disk even more
                raise
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        with unavailable_when_files_fail(), contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as files:
            yield from (file.name for file in files if file.name.startswith(prefix))

    def delete(self, name: str) -> None:
        with unavailable_when_files_fail():
            (self._folder / name).unlink(missing_ok=True)


class FsspecArtifacts(Artifacts):
    """Files in any other file system that fsspec knows by a URL, such as `s3://bucket/folder`.

    A server that hangs is given up after `patience_s`, as an attempt that waits for it holds its slot.
    """

    patience_s = 25.0

    def __init__(self, url: str, base_url: str, options: Mapping[str, Any]) -> None:
        super().__init__(base_url)
        self._url, self._options = url.rstrip("/"), dict(options)
        self._is_s3 = url.startswith("s3://")

    def _open(self) -> tuple[AbstractFileSystem, str, Document]:
        """The file system, the folder in it, and the options of each call."""
        import fsspec

        files, folder = fsspec.core.url_to_fs(self._url, **self._options)
        return files, folder, {"timeout": self.patience_s} if files.async_impl else {}

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        with unavailable_when_files_fail():
            files, folder, options = self._open()
            options |= {"ContentType": content_type} if self._is_s3 else {}
            files.pipe_file(f"{folder}/{name}", data, **options)
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        with unavailable_when_files_fail():
            files, folder, options = self._open()
            for path in files.glob(f"{folder}/{prefix}*", **options):
                yield path.rsplit("/", 1)[-1]

    def delete(self, name: str) -> None:
        with unavailable_when_files_fail():
            files, folder, options = self._open()
            with contextlib.suppress(FileNotFoundError):
                files.rm_file(f"{folder}/{name}", **options)


class InlineArtifacts(Artifacts):
    """No files: the URL holds the data itself, for set-ups in which nothing serves files."""

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        return f"data:{content_type};base64,{base64.b64encode(data).decode()}"

    def names(self, prefix: str = "") -> Iterator[str]:
        return iter(())

    def delete(self, name: str) -> None:
        return None


def open_artifacts(
    url: str, base_url: str, database: Callable[[], Database[Document]], s3_options: Mapping[str, Any]
) -> Artifacts:
    """The store that a URL names. The database is opened only where the files go into it."""
    if url == "gridfs":
        return GridFSArtifacts(database(), base_url)
    if url == "data:":
        return InlineArtifacts(base_url)
    if url.startswith("file://"):
        return FolderArtifacts(Path(url.removeprefix("file://")), base_url)
    return FsspecArtifacts(url, base_url, s3_options if url.startswith("s3://") else {})
