"""The HTTP client for model servers and for the hosts of their pictures, and what its errors mean."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from workerkit import __version__
from workerkit.connections import reason_of
from workerkit.errors import FailJob, JobError, OperatorFault, ProviderAway, RetryJob
from workerkit.refusals import CHECK_PROXY, Cause, by_status
from workerkit.sentences import UNUSABLE

if TYPE_CHECKING:
    import aiohttp

USER_AGENT = f"ai-backend-worker/{__version__}"
CONNECT_S, KEEP_CONNECTION_S, LOOK_AT_CONNECTION_S = 10.0, 60.0, 1.0
WRONG_SHAPE_ERRORS = (AttributeError, TypeError, LookupError, ValueError, RecursionError)


def open_session() -> aiohttp.ClientSession:
    """An HTTP client for any number of calls at a time. It keeps no cookies and unpacks nothing."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_CONNECTION_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity", "user-agent": USER_AGENT},
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S),  # the attempt has a deadline for the rest
        auto_decompress=False,
    )


@contextlib.contextmanager
def connection_watched(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Ends a read when its connection is gone. After a broken chunk aiohttp (3.14) closes it but wakes no reader.

    See `test_aiohttp_wakes_no_reader_after_a_broken_chunk`.
    """
    import aiohttp

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def look() -> None:
        transport = response.connection and response.connection.transport
        if response.connection and (transport is None or transport.is_closing()):
            response.content.set_exception(aiohttp.ClientPayloadError("the connection is closed"))
        timers[:] = [loop.call_later(LOOK_AT_CONNECTION_S, look)]

    timers.append(loop.call_later(LOOK_AT_CONNECTION_S, look))
    try:
        yield
    finally:
        timers[0].cancel()


def proxy_error(status: int) -> JobError:
    """What it means that a proxy didn't connect the worker with a server. The request was never sent."""
    detail = f"HTTP {status} of the proxy"
    if by_status(status) is Cause.BUSY:
        return ProviderAway(detail, is_counted=False)
    return OperatorFault(f"{detail}: {CHECK_PROXY}")


@contextlib.contextmanager
def provider_errors() -> Iterator[None]:
    """Turns every error that a provider's answer, or the way to it, can raise into RetryJob or FailJob.

    Only the reason or the error's class is kept, since its text may hold the key or the prompt; hence `from None`.
    """
    import aiohttp

    try:
        yield
    except JobError:
        raise
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        detail = reason_of(error) or type(error).__name__
        raise ProviderAway(detail, is_counted=False) from None  # the request was never sent
    except aiohttp.ClientHttpProxyError as error:
        raise proxy_error(error.status) from None
    except WRONG_SHAPE_ERRORS as error:
        raise FailJob(type(error).__name__, UNUSABLE) from None
    except (aiohttp.ClientError, OSError) as error:
        raise RetryJob(type(error).__name__, ProviderAway.default_sentence) from None
