"""Which model each kind of job gets, and what is wrong with it: asked once, when the worker starts or is checked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from workerkit.errors import FailJob, ProviderAway, RetryJob
from workerkit.models import Offered, choose, remark
from workerkit.provider import OpenAIProvider
from workerkit.settings import PROVIDER_KINDS, ProviderSettings, Settings


@dataclass(frozen=True)
class ModelInUse:
    """A kind's server with its model, whether that was chosen now, and a fault for the operator, if there is one.

    `away` is why the server can't be reached.
    """

    where: ProviderSettings
    is_chosen: bool = False
    fault: str = ""
    away: ProviderAway | None = None


async def list_models(where: ProviderSettings, max_bytes: int) -> Offered | ProviderAway | None:
    """What a server lists, or why it can't be reached. None: it lists nothing; a job's own call shows what is wrong."""
    provider = OpenAIProvider(where, max_bytes)
    try:
        return await provider.models()
    except ProviderAway as away:
        return away
    except (RetryJob, FailJob):
        return None
    finally:
        await provider.close()


def list_all(servers: Iterable[ProviderSettings], max_bytes: int) -> list[Offered | ProviderAway | None]:
    """What each server lists. All are asked at the same time, so that those that hang cost no more than one.

    `asyncio.run` would wait for a name server that doesn't answer; closing the loop doesn't.
    """

    async def ask() -> list[Offered | ProviderAway | None]:
        return await asyncio.gather(*(list_models(where, max_bytes) for where in servers))

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(ask())


def look_at(where: ProviderSettings, offered: Offered | ProviderAway | None) -> ModelInUse:
    """The model of a kind, chosen if none is set and the server lists its models. Jobs may name others as well."""
    if isinstance(offered, ProviderAway):
        return replace(look_at(where, None), away=offered)
    today, is_chosen = datetime.now(UTC).date(), not where.model
    if is_chosen and offered is None and not where.is_openai:
        return ModelInUse(where)
    try:
        model = where.model or choose(where, offered)
    except FailJob as fault:
        return ModelInUse(where, fault=fault.detail)
    remarks = [remark(where, name, offered, today) for name in dict.fromkeys((model, *where.allowed_models))]
    return ModelInUse(replace(where, model=model), is_chosen, "; ".join(filter(None, remarks)))


def models_in_use(settings: Settings) -> list[ModelInUse]:
    """The model of each kind that has a server. Each server is asked once, and all together take three seconds."""
    kinds = [where for kind in PROVIDER_KINDS if not (where := settings.provider(kind)).is_offline]
    servers = {(where.base_url, where.api_key): where for where in kinds}
    offered = dict(zip(servers, list_all(servers.values(), settings.max_answer_bytes), strict=True))
    return [look_at(where, offered[where.base_url, where.api_key]) for where in kinds]
