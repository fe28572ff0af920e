"""An OpenAI-compatible server in a thread, which keeps a record of its calls.

Each prompt decides, by directives in brackets, how its call is answered: `testbed.answers` lists the directives.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final, Literal

from aiohttp import web

from testbed.answers import (
    CREATED_AT,
    FAULTS,
    MEGABYTE,
    PACKINGS,
    RAW_ANSWERS,
    Answer,
    Body,
    Plan,
    chat_answer,
    file_answer,
    first_half,
    gzip_bomb,
    image_answer,
    packed,
    parse_directives,
    prompt_of,
    refusal,
    shape_answer,
    speech_answer,
)
from testbed.network import Certificate
from testbed.processes import LOOPBACK, START_TIMEOUT_S, STOP_TIMEOUT_S, free_port, reachable_host

Outcome = Literal["running", "answered", "disconnected", "fault"]
Answerer = Callable[[Body, Plan, str], Answer]
MODELS: Final = ("testbed-model",)
MAX_REQUEST_BYTES: Final = 64 * MEGABYTE


@dataclass
class Call:
    """The record of one request. Its times are Unix times."""

    route: str
    prompt: str
    model: str
    body: Body
    authorization: str | None
    started_at: float
    connection: object = None  # the client's address, which is the same for all calls over one connection
    ended_at: float | None = None
    outcome: Outcome = "running"
    query: str = ""
    api_key: str | None = None  # in the header where Azure has it

    @property
    def duration_s(self) -> float:
        """The seconds from the request to its end or, while it runs, to now."""
        return (self.ended_at or time.time()) - self.started_at

    def finish(self, outcome: Outcome) -> None:
        """Record how the call ended. Only the first outcome is kept."""
        if self.outcome == "running":
            self.ended_at = time.time()
            self.outcome = outcome


@dataclass(frozen=True)
class Exchange:
    """A request that is being answered, with what belongs to it."""

    request: web.Request
    body: Body
    plan: Plan
    call: Call


def error_response(status: int, message: str, retry_after: str = "", code: str | None = None) -> web.Response:
    """Return an error in OpenAI's form."""
    kind = {401: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    kind = "invalid_request_error" if status in {400, 404, 413, 422} else kind
    error = {"message": message, "type": kind, "param": None, "code": "invalid_api_key" if status == 401 else code}
    headers = {"Retry-After": retry_after} if retry_after else {}
    return web.json_response({"error": error}, status=status, headers=headers)


def _key_error(request: web.Request, prompt: str = "") -> web.Response:
    """Return the answer to a wrong key. It repeats key and prompt, so that tests can look for them in logs."""
    key = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return error_response(401, f"Incorrect API key provided: {key}. You can find it in your account. {prompt}")


class Provider:
    """An OpenAI-compatible server in a thread, which keeps its port over restarts. It is a context manager."""

    def __init__(
        self, port: int = 0, host: str = LOOPBACK, api_key: str | None = None, certificate: Certificate | None = None
    ) -> None:
        """Choose the address and the key that requests must have, but start nothing.

        Without a key all requests are accepted. With a certificate the provider speaks https only.
        """
        self.certificate = certificate
        self.host = host
        self.port = port or free_port()
        self.api_key = api_key
        self._offer_the_usual()
        self._calls: list[Call] = []
        self._calls_by_prompt: Counter[str] = Counter()
        self._files: dict[str, tuple[Body, Plan]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: Future[None] = Future()
        self._is_stopping = False

    def _offer_the_usual(self) -> None:
        """Offer one model. A test may change what is offered; `models_fault` is a directive for the list."""
        self.models: tuple[str, ...] | None = MODELS  # None: it doesn't list them
        self.models_fault, self.lists_given = "", 0

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://{reachable_host(self.host)}:{self.port}/v1"

    @property
    def is_running(self) -> bool:
        """Whether the provider accepts requests."""
        return self._thread is not None

    @property
    def calls(self) -> list[Call]:
        """All calls so far, including those that still run, oldest first."""
        with self._lock:
            return list(self._calls)

    @property
    def running(self) -> list[Call]:
        """The calls that are not answered yet."""
        return [call for call in self.calls if call.outcome == "running"]

    def calls_for(self, prompt_fragment: str) -> list[Call]:
        """Return the calls whose prompt contains this text, oldest first."""
        return [call for call in self.calls if prompt_fragment in call.prompt]

    def clear(self) -> None:
        """Delete the record of calls, and offer the usual models. For `times=N` the count begins again."""
        with self._lock:
            self._calls.clear()
            self._calls_by_prompt.clear()
            self._offer_the_usual()

    def start(self) -> Provider:
        """Start to listen, unless the provider does already. Raises: OSError, when the port is taken."""
        if self._thread is None:
            self._started, self._is_stopping = Future(), False
            self._thread = threading.Thread(target=self._run, name="provider", daemon=True)
            self._thread.start()
            try:
                self._started.result(START_TIMEOUT_S)
            except OSError:
                self._thread = None
                raise
        return self

    def stop(self) -> None:
        """Cut the running calls and refuse new connections, as if the provider were down. The record is kept."""
        if self._thread and self._loop:
            self._is_stopping = True
            self._loop.call_soon_threadsafe(self._stop_requested.set)
            self._thread.join(STOP_TIMEOUT_S)
            self._thread = None

    def __enter__(self) -> Provider:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        """Run the event loop. This is what the provider's thread does."""
        asyncio.run(self._main())

    async def _main(self) -> None:
        """Serve until `stop` is called. Runs in the provider's thread."""
        self._loop, self._stop_requested = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        try:
            await runner.setup()
            context = self.certificate.context() if self.certificate else None
            site = web.TCPSite(runner, self.host, self.port, backlog=1024, reuse_address=True, ssl_context=context)
            await site.start()
        except BaseException as error:
            await runner.cleanup()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        await self._stop_requested.wait()
        await runner.cleanup()

    def _application(self) -> web.Application:
        """Return a new application with all routes."""
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        answerers: dict[str, Answerer] = {
            "/v1/chat/completions": chat_answer,
            "/v1/images/generations": image_answer,
            "/v1/audio/speech": speech_answer,
        }
        for path, answerer in answerers.items():
            azure = f"/openai/deployments/{{name}}{path.removeprefix('/v1')}"
            for one in (path, f"/accounts/{{account}}{path}", azure):
                application.router.add_post(one, self._generation(answerer))
        for one in ("/v1/models", "/accounts/{account}/v1/models"):
            application.router.add_get(one, self._list_models)
        application.router.add_get("/files/{name}", self._serve_file)
        application.router.add_get("/calls", self._list_calls)
        return application

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        """Respond with the list of models."""
        if not self._is_authorized(request):
            return _key_error(request)
        self.lists_given += 1
        if failure := await _fail_as_a_whole(request, Plan("", parse_directives(self.models_fault))):
            return failure
        if self.models is None:
            return error_response(404, "There is no such page.")
        common = {"object": "model", "created": CREATED_AT, "owned_by": "testbed"}
        models = [{"id": name, **common} for name in self.models]
        return web.json_response({"object": "list", "data": models})

    async def _list_calls(self, _request: web.Request) -> web.Response:
        """Respond with the record of calls, for a test in another process."""
        return web.json_response([asdict(call) for call in self.calls])

    def _generation(self, answerer: Answerer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler of a route that generates texts, pictures or sounds."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = await request.json()
            except ValueError:
                body = None
            if not isinstance(body, dict):
                return error_response(400, "We could not parse the JSON body of your request.")
            call = self._record(request, body, prompt_of(body))
            exchange = Exchange(request, body, self._plan_for(call.prompt), call)
            with self._noting_the_end(exchange):
                if not self._is_authorized(request):
                    call.finish("fault")
                    return _key_error(request)
                return await self._respond(exchange, answerer)

        return handle

    async def _serve_file(self, request: web.Request) -> web.StreamResponse:
        """Respond with a picture whose URL was in an earlier answer, by the plan of that answer's prompt."""
        if request.match_info["name"] not in self._files:
            return error_response(404, "There is no such file.")
        body, plan = self._files[request.match_info["name"]]
        exchange = Exchange(request, body, plan, self._record(request, {}, plan.prompt))
        with self._noting_the_end(exchange):
            return await self._respond(exchange, file_answer)

    def _is_authorized(self, request: web.Request) -> bool:
        """Return whether the request has the right key, or needs none."""
        return self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}"

    def _record(self, request: web.Request, body: Body, prompt: str) -> Call:
        """Add a call that begins now to the record, and return it."""
        authorization = request.headers.get("Authorization")
        connection = request.transport and request.transport.get_extra_info("peername")
        call = Call(request.path, prompt, str(body.get("model", "")), body, authorization, time.time(), connection)
        call.query, call.api_key = request.rel_url.raw_query_string, request.headers.get("api-key")
        with self._lock:
            self._calls.append(call)
        return call

    def _plan_for(self, prompt: str) -> Plan:
        """Count the call and return the directives that apply to it."""
        directives = parse_directives(prompt)
        with self._lock:
            self._calls_by_prompt[prompt] += 1
            number = self._calls_by_prompt[prompt]
        return Plan(prompt, {name: one for name, one in directives.items() if number <= one.times})

    @contextmanager
    def _noting_the_end(self, exchange: Exchange) -> Iterator[None]:
        """Record how the call ended: by its client, by `stop`, with a fault, or with a good answer."""
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            exchange.call.finish("fault" if self._is_stopping else "disconnected")
            raise
        finally:
            exchange.call.finish("fault" if FAULTS & exchange.plan.directives.keys() else "answered")

    async def _respond(self, exchange: Exchange, answerer: Answerer) -> web.StreamResponse:
        """Respond as the plan says: wait, fail, or send an answer, which may be a wrong one."""
        origin, plan = "", exchange.plan
        if "url" in plan and answerer is image_answer:
            origin, plan = self._publish_file(exchange)
        if "delay" in plan:
            await asyncio.sleep(plan.number("delay", 1))
        if failure := await _fail_as_a_whole(exchange.request, plan):
            return failure
        if refused := _refuse(exchange, plan):
            exchange.call.finish("fault")
            return refused
        if "raw" in plan:
            return await _send_raw(exchange, RAW_ANSWERS[plan.text("raw", "nothing")]())
        try:
            answer = (shape_answer if "shape" in plan else answerer)(exchange.body, plan, origin)
        except (TypeError, ValueError) as error:
            exchange.call.finish("fault")
            return error_response(400, f"Invalid request: {error}")
        answer = Answer(plan.text("type", answer.content_type), answer.chunks)
        if len(answer.chunks_known) == 1 and not {"cut", "drip", "packed"} & plan.directives.keys():
            return web.Response(body=answer.chunks_known[0], content_type=answer.content_type)
        return await _send_in_chunks(exchange, answer, plan)

    def _publish_file(self, exchange: Exchange) -> tuple[str, Plan]:
        """Return the URL of the picture and the plan of the answer that names it.

        With a bare `[url]` the provider serves the picture itself, and all other directives apply to that file.
        """
        if exchange.plan.text("url"):
            return "", exchange.plan
        name = f"{len(self._files)}.png"
        self._files[name] = (exchange.body, exchange.plan.without("url"))
        plan = Plan(exchange.plan.prompt, {"url": exchange.plan.directives["url"]})
        return f"http://{exchange.request.host}/files/{name}", plan


async def _fail_as_a_whole(request: web.Request, plan: Plan) -> web.StreamResponse | None:
    """Return the response of a directive that takes the place of any answer, or None without such a directive."""
    if "hang" in plan:
        await asyncio.Event().wait()
    if "status" in plan:
        status = int(plan.number("status", 500))
        message = f"The server had an error while processing your request (testbed): {plan.prompt}"
        return _key_error(request, plan.prompt) if status == 401 else error_response(status, message, plan.retry_after)
    if "loading" in plan:
        return error_response(503, "Loading model")
    if "redirect" in plan:
        return web.Response(status=302, headers={"Location": plan.text("redirect", "http://127.0.0.1:9/")})
    if "gzip" in plan:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        return web.Response(body=gzip_bomb(int(plan.number("gzip", 1))), headers=headers)
    if "html" in plan:
        page = "<!doctype html><html><body><h1>Welcome to the proxy</h1></body></html>"
        return web.Response(text=page, content_type="text/html")
    return None


def _refuse(exchange: Exchange, plan: Plan) -> web.Response | None:
    """Return the refusal of a field or of the model, or None where the plan takes what was asked for."""
    if "gone" in plan and plan.text("gone") in ("*", exchange.body.get("model")):
        return error_response(404, "The model does not exist (testbed).", code="model_not_found")
    for field in plan.text("refuse").split():
        if field in exchange.body:
            status, answer = refusal(plan, field)
            return web.Response(status=status, body=answer.chunks_known[0], content_type=answer.content_type)
    return None


async def _send_raw(exchange: Exchange, pieces: Iterable[bytes]) -> web.StreamResponse:
    """Write bytes to the connection without the HTTP library, as fast as the client reads, and close it."""
    transport = exchange.request.transport
    assert transport is not None
    for piece in pieces:
        while transport.get_write_buffer_size() > MEGABYTE and not transport.is_closing():
            await asyncio.sleep(0.001)
        if transport.is_closing():
            break
        transport.write(piece)
        await asyncio.sleep(0)
    exchange.call.finish("fault")
    transport.close()
    return web.Response()


async def _send_in_chunks(exchange: Exchange, answer: Answer, plan: Plan) -> web.StreamResponse:
    """Send an answer chunk by chunk, at the pace of the plan, and cut it where the plan says so."""
    response = web.StreamResponse(headers={"Content-Type": answer.content_type})
    chunks, pace_s = answer.chunks, plan.number("pace", 0)
    if "packed" in plan:
        response.headers["Content-Encoding"], bits = PACKINGS[plan.text("packed", "gzip")]
        chunks = packed(chunks, bits)
    await response.prepare(exchange.request)
    if "cut" in plan:
        chunks = first_half(chunks)
    if "drip" in plan:
        chunks, pace_s = (bytes([byte]) for chunk in chunks for byte in chunk), plan.number("drip", 1)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(pace_s)
    await asyncio.sleep(plan.number("linger", 0))
    if "cut" in plan and exchange.request.transport:
        exchange.call.finish("fault")
        exchange.request.transport.abort()
    else:
        await response.write_eof()
    return response
