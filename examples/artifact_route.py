"""The API's route for files that the worker keeps in GridFS (`ARTIFACT_URL=gridfs`): copy it into a FastAPI app.

It answers requests for a part of a file (`Range`), without which Safari plays no sound, and other browsers can't seek.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from gridfs import GridFS, GridOut, NoFile
from pymongo.database import Database

PIECE_BYTES = 262_144
ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)
# Files never change. Without nosniff a browser might run what a model has made.
HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "private, max-age=31536000, immutable",
    "X-Content-Type-Options": "nosniff",
}


def add_artifacts(app: FastAPI, database: Database[Any]) -> None:
    """Adds `GET` and `HEAD /artifacts/{name}`, the address that `ARTIFACT_BASE_URL` has by default.

    A name has 16 random digits, which only the job's document tells. So whoever has an address may read that file. An
    API that must know better finds the job by the first 24 digits of the name, and compares its `user_id`.
    """
    files = GridFS(database, collection="artifacts")

    @app.api_route("/artifacts/{name}", methods=["GET", "HEAD"])
    def artifact(name: str, request: Request) -> Response:
        try:
            file = files.get_last_version(name)
        except NoFile:
            raise HTTPException(404, "There is no such file.") from None
        etag = f'"{quote(str(file._id), safe="")}"'
        headers = {**HEADERS, "ETag": etag, "Content-Length": str(file.length)}
        content_type = (file.metadata or {}).get("contentType", "application/octet-stream")
        if is_known(request, etag):
            return Response(status_code=304, headers={**HEADERS, "ETag": etag})
        if request.method == "HEAD":
            return Response(headers=headers, media_type=content_type)
        wanted = part_of(request, etag, file.length)
        if wanted is None:
            return StreamingResponse(pieces(file, range(file.length)), headers=headers, media_type=content_type)
        if not wanted:
            raise HTTPException(416, "The file has no such part.", {"Content-Range": f"bytes */{file.length}"})
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{file.length}"
        headers["Content-Length"] = str(len(wanted))
        return StreamingResponse(pieces(file, wanted), 206, headers, content_type)


def is_known(request: Request, etag: str) -> bool:
    """Whether the browser has the file already, as `If-None-Match` says."""
    tags = ",".join(request.headers.getlist("If-None-Match")).split(",")
    return not {etag, "*"}.isdisjoint(tag.strip().removeprefix("W/") for tag in tags)


def part_of(request: Request, etag: str, length: int) -> range | None:
    """The bytes that the request asks for. None: all of them. An empty range: the file has no such bytes.

    HTTP allows to answer several ranges by the whole file, and demands it for a range of a wrong form, and for a part
    of another version (`If-Range`).
    """
    match = ONE_RANGE.fullmatch(request.headers.get("Range", "").strip())
    if match is None or match[0].endswith("=-") or request.headers.get("If-Range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:  # the last so many bytes
        return range(max(0, length - int(last)), length)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, length) if last else length)


def pieces(file: GridOut, part: range) -> Iterator[bytes]:
    """Reads a part of a file piece by piece, so that no file is in memory as a whole. FastAPI does it in a thread."""
    file.seek(part.start)
    for start in range(part.start, part.stop, PIECE_BYTES):
        yield file.read(min(PIECE_BYTES, part.stop - start))
