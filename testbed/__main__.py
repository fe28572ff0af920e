"""`python -m testbed`: MongoDB, Redis and the provider for someone who tries a worker by hand."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType

import click

from testbed.processes import LOOPBACK, ServerFailed, ServerUnavailable
from testbed.provider import Provider
from testbed.servers import DATABASE, MongoServer, RedisServer


def _wait_for_the_end() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    ended.wait()


@click.command()
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen on.")
@click.option("--mongodb-port", default=0, help="Port of MongoDB; any free one by default.")
@click.option("--redis-port", default=0, help="Port of Redis; any free one by default.")
@click.option("--provider-port", default=0, help="Port of the provider; any free one by default.")
@click.option("--provider-only", is_flag=True, help="Start neither MongoDB nor Redis.")
def main(host: str, mongodb_port: int, redis_port: int, provider_port: int, provider_only: bool) -> None:
    """Run MongoDB, Redis and a provider that misbehaves on demand, until Ctrl-C or SIGTERM."""
    with ExitStack() as stack:
        lines = []
        try:
            if not provider_only:
                lines.append(f"MONGODB_URL={stack.enter_context(MongoServer(mongodb_port, host)).url}")
                lines.append(f"DATABASE_NAME={DATABASE}")
                lines.append(f"REDIS_URL={stack.enter_context(RedisServer(redis_port, host)).url}")
            lines.append(f"OPENAI_BASE_URL={stack.enter_context(Provider(provider_port, host)).url}")
        except (ServerUnavailable, ServerFailed, OSError) as error:
            raise click.ClickException(str(error)) from error
        print("\n".join(lines), flush=True)
        _wait_for_the_end()


if __name__ == "__main__":
    main()
