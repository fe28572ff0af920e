"""The API's route for files that the worker keeps in GridFS (`ARTIFACT_URL=gridfs`): copy it into a FastAPI app."""

from typing import Any

from fastapi import FastAPI, HTTPException, Response
from gridfs import GridFS, NoFile
from pymongo.database import Database


def add_artifacts(app: FastAPI, database: Database[Any]) -> None:
    """Adds `GET /artifacts/{name}`, the address that `ARTIFACT_BASE_URL` has by default."""
    files = GridFS(database, collection="artifacts")

    @app.get("/artifacts/{name}")
    def artifact(name: str) -> Response:
        try:
            file = files.get_last_version(name)
        except NoFile:
            raise HTTPException(404) from None
        # Files never change. Without nosniff a browser might run what a model has made.
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=31536000, immutable"}
        content_type = (file.metadata or {}).get("contentType", "application/octet-stream")
        return Response(file.read(), media_type=content_type, headers=headers)
