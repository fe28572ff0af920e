"""Which model each kind of job gets, and what is wrong with it: asked once, when the worker starts or is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from workerkit.errors import FailJob, RetryJob
from workerkit.models import Offered, choose, remark
from workerkit.provider import OpenAIProvider
from workerkit.settings import PROVIDER_KINDS, ProviderSettings, Settings


@dataclass(frozen=True)
class ModelInUse:
    """A kind's server with its model, whether that was chosen now, and a fault for the operator, if there is one."""

    where: ProviderSettings
    is_chosen: bool = False
    fault: str = ""


async def list_models(servers: Iterable[ProviderSettings], max_bytes: int) -> dict[tuple[str, str], Offered]:
    """What each server lists, by its URL and key. One that lists nothing is left out."""
    found = {}
    for where in servers:
        provider = OpenAIProvider(where, max_bytes)
        try:
            found[where.base_url, where.api_key] = await provider.models()
        except (RetryJob, FailJob):
            pass  # a job's own call shows what is wrong
        finally:
            await provider.close()
    return found


def look_at(where: ProviderSettings, offered: Offered | None) -> ModelInUse:
    """The model of a kind, chosen if none is set and the server lists its models."""
    today, is_chosen = datetime.now(UTC).date(), not where.model
    if is_chosen and offered is None and not where.is_openai:
        return ModelInUse(where)
    try:
        model = where.model or choose(where, offered)
    except FailJob as fault:
        return ModelInUse(where, fault=fault.detail)
    return ModelInUse(replace(where, model=model), is_chosen, remark(where, model, offered, today))


def models_in_use(settings: Settings) -> list[ModelInUse]:
    """The model of each kind that has a server. Each server is asked once, and for three seconds at most."""
    kinds = [where for kind in PROVIDER_KINDS if not (where := settings.provider(kind)).is_offline]
    servers = {(where.base_url, where.api_key): where for where in kinds}
    offered = asyncio.run(list_models(servers.values(), settings.max_answer_bytes))
    return [look_at(where, offered.get((where.base_url, where.api_key))) for where in kinds]
