"""A group of commands, each in a module that is imported only when its command is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, cast

import click


class LazyGroup(click.Group):
    """The commands of these names: `command` in the module of the package that has the command's name."""

    def __init__(self, *args: Any, package: str, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._package, self._names = package, names

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *self._names])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self._names:
            return super().get_command(context, name)
        return cast(click.Command, importlib.import_module(f"{self._package}.{name}").command)
