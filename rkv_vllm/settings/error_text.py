"""Formats a pydantic ValidationError as one line."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: ValidationError, depth: int | None = None) -> str:
    """One line that names each wrong field.

    Args:
        depth: parts of a field's path that name it; None: all of them.
    """
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"][:depth])
        message = problem["msg"].removeprefix("Value error, ")  # pydantic's, where the text is ours
        lines.append(f"{field}: {message}" if field else message)
    return "; ".join(dict.fromkeys(lines))
