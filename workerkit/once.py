"""Parts of an object that are made when first used."""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeVar, cast

T = TypeVar("T")


class made_once(cached_property[T]):
    """A part of an object that has a `lock`: made when first used, by one of the threads that ask for it."""

    def __get__(self, instance: Any, owner: Any = None) -> T:  # type: ignore[override]
        with instance.lock:
            return cast(T, super().__get__(instance, owner))
