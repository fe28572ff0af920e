"""The example's routes: a page, the jobs of the person who looks at it, their live updates and their files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

from celery import Celery
from fastapi import Cookie, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError, PyMongoError

from examples.api.jobs import BUSY, Document, Jobs, Owner
from examples.api.live import Live
from examples.artifact_route import add_artifacts

USER_ID = "example-user"  # an API with logins has the person's id here
PAGE = Path(__file__).with_name("page.html")
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second one for nginx


class NewJob(BaseModel):
    job_type: str
    input_data: Document


def owner(example_session: Annotated[str, Cookie()]) -> Owner:
    """Whose jobs a request is about: the page has set a cookie with its session."""
    return {"user_id": USER_ID, "session_id": example_session}


Whose = Annotated[Owner, Depends(owner)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    listening = asyncio.create_task(app.state.live.listen())
    yield
    listening.cancel()


async def on_database_error(_: Request, error: Exception) -> Response:
    if isinstance(error, DuplicateKeyError):  # of an index that allows a session one active job
        return JSONResponse({"detail": BUSY}, 409)
    return JSONResponse({"detail": "The database can't be reached. Please try again in a minute."}, 503)


def create_app(database: Database[Document], redis_url: str, celery: Celery, queue: str) -> FastAPI:
    """The app. Call `app.state.live.end()` before a shutdown, or the server waits for pages that are open."""
    app = FastAPI(openapi_url=None, lifespan=lifespan, exception_handlers={PyMongoError: on_database_error})
    jobs = Jobs(database, celery, queue)
    live = app.state.live = Live(redis_url, jobs.newest)
    add_artifacts(app, database)

    async def change(owner: Owner, method: Any, *arguments: Any) -> None:
        await run_in_threadpool(method, owner, *arguments)  # it waits for servers
        live.wake(owner)

    @app.get("/")
    def page(example_session: Annotated[str | None, Cookie()] = None) -> Response:
        response = FileResponse(PAGE, headers={"Cache-Control": "no-cache"})
        if example_session is None:  # behind TLS, add secure=True
            response.set_cookie("example_session", token_hex(16), httponly=True, samesite="strict")
        return response

    @app.get("/api/events")
    def events(whose: Whose) -> Response:
        return StreamingResponse(live.stream(whose), headers=STREAM_HEADERS, media_type="text/event-stream")

    @app.post("/api/jobs", status_code=204)
    async def submit(whose: Whose, job: NewJob) -> None:
        await change(whose, jobs.submit, job.job_type, job.input_data)

    @app.post("/api/jobs/{job_id}/cancel", status_code=204)
    async def cancel(whose: Whose, job_id: str) -> None:
        await change(whose, jobs.cancel, job_id)

    @app.post("/api/jobs/{job_id}/retry", status_code=204)
    async def retry(whose: Whose, job_id: str) -> None:
        await change(whose, jobs.retry, job_id)

    return app
