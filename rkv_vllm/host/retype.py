"""Overriding methods of an object that vLLM makes itself, where it offers no hook or factory.

Re-typing the object, instead of wrapping it, keeps every isinstance check on it true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def retype(instance: Any, subclass: type[T]) -> T:
    """Makes an object one of a subclass of its class; its attributes stay.

    Raises: TypeError where `subclass` is no subclass of the object's class.
    """
    if not issubclass(subclass, type(instance)):
        raise TypeError(f"{subclass.__name__} is no subclass of {type(instance).__name__}")
    instance.__class__ = subclass
    retyped: T = instance
    return retyped


def override(instance: Any, prefix: str, **methods: Callable[..., Any]) -> None:
    """Re-types an object to a new subclass with other methods.

    Args:
        instance: the object.
        prefix: what the new class's name begins with.
        methods: by name; each is given the object first.
    """
    host_class = type(instance)
    retype(instance, type(f"{prefix}{host_class.__name__}", (host_class,), methods))
