"""Whether types that were generated from a schema know every field of a document."""

from __future__ import annotations

from typing import Any


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths of what stands in `ours` and not, with the same value, in `theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            where
            for key, value in ours.items()
            for where in (lost(value, theirs[key], f"{path}.{key}") if key in theirs else [f"{path}.{key}"])
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            where
            for i, pair in enumerate(zip(ours, theirs, strict=True))
            for where in lost(*pair, f"{path}[{i}]")
        ]
    return [] if ours == theirs else [path]
