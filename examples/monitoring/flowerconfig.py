"""Flower's configuration, for `celery -A worker flower --conf=FILE`: it only shows, and never a prompt."""

from typing import Any

from flower.events import EventsState

read_only = True  # no button and no request can revoke, start or stop anything

show = EventsState.event


def show_without_arguments(state: Any, event: dict[str, Any]) -> None:
    """A worker's events name the job only. Those of the API's own client (`task-sent`) hold the prompt.

    Such an event may come last. An empty text in it would take the place of the job's name.
    """
    hidden = ("args", "kwargs") if event["type"] == "task-sent" else ()
    show(state, {name: value for name, value in event.items() if name not in hidden})


EventsState.event = show_without_arguments
