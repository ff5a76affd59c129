"""Text of errors: what somebody else wrote, escaped and cut, and pydantic's ValidationErrors as one line.

Every name and value that comes from a client or a file goes through here on its way into an answer or a log:
in ASCII, because half of a surrogate pair cannot be sent and a line feed would begin a line of a log; cut,
because it may be as long as a body.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

#: Most characters that are shown of a name or a value.
MOST_SHOWN = 40
#: Most characters of one of pydantic's messages; ours are shorter.
MOST_OF_MESSAGE = 300
#: Most problems that one line names; no model here has as many fields.
MOST_PROBLEMS = 20

#: Takes any object, and writes in parts: what is long, deep or contains itself is not written beyond what is
#: shown.
_ENCODER = json.JSONEncoder(check_circular=False, skipkeys=True, default=repr)


def shown(value: Any) -> str:
    """`value` as JSON in ASCII, which is how a client wrote it, cut to `MOST_SHOWN` characters."""
    text = ""
    for part in _ENCODER.iterencode(value):
        text += part
        if len(text) > MOST_SHOWN:
            break
    return cut(text)


def shown_name(name: str) -> str:
    """`name` as `shown` has it, without the quotes."""
    return cut(json.dumps(name)[1:-1])


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write in place of a wrong name, to be put behind it; empty where none is near."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0].removeprefix('--')}?" if found else ""


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """`text`, with an ellipsis for what is beyond `most` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def one_line(problems: Sequence[str]) -> str:
    """Each of `problems` once, in one line; of very many the first ones, and how many more there are."""
    distinct = list(dict.fromkeys(problems))
    more = len(distinct) - MOST_PROBLEMS
    return "; ".join([*distinct[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])


#: How most of pydantic's messages begin.
_SHOULD_BE = "Input should be "


def explain(
    error: ValidationError, depth: int | None = None, named: Callable[[str], str] = lambda field: field
) -> str:
    """One line that names each wrong field and says what it takes; of a union, what each member takes.

    Args:
        depth: parts of a field's path that name it; None: all of them.
        named: what a user calls a field, an option or a variable for example.
    """
    messages: dict[str, list[str]] = {}
    for problem in error.errors():
        field = ".".join(shown_name(str(part)) for part in problem["loc"][:depth])
        # pydantic's prefix, where the text is ours
        message = cut(problem["msg"].removeprefix("Value error, "), MOST_OF_MESSAGE)
        messages.setdefault(named(field) if field else "", []).append(message)
    lines = []
    for field, (first, *others) in messages.items():
        text = " or ".join([first, *(other.removeprefix(_SHOULD_BE) for other in others)])
        lines.append(f"{field}: {text}" if field else text)
    return one_line(lines)
