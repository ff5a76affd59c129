"""The releases of vLLM that rkv-vllm works with, and how it is said what it relies on in them."""

from __future__ import annotations

from collections.abc import Mapping

#: Those this was written and tested against, the oldest first.
SUPPORTED = ("0.32.0", "0.33.0")

#: A method's parameters in order, `self` left out; a set: of an abstract class, the methods that a subclass
#: has to define; None: an attribute of instances.
Expected = tuple[str, ...] | frozenset[str] | None
#: Where something lives -> what is expected there. What releases differ in is said by the first of each kind.
Contract = Mapping[str, Expected | Mapping[str, Expected]]


def attributes(by_class: Mapping[str, str]) -> Contract:
    """Of names separated by spaces, by class below `vllm.v1`."""
    return {f"vllm.v1.{where}.{name}": None for where, names in by_class.items() for name in names.split()}


def as_of(release: str, entry: Expected | Mapping[str, Expected]) -> Expected:
    """What is expected in a release; in one that is not supported what the newest of those has."""
    if not isinstance(entry, Mapping):
        return entry
    count = SUPPORTED.index(release) + 1 if release in SUPPORTED else len(SUPPORTED)
    return next(entry[since] for since in reversed(SUPPORTED[:count]) if since in entry)
