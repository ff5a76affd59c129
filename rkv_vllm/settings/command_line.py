"""Command lines of `vllm serve`, made of the user's options and ours."""

from __future__ import annotations

import json
from collections import deque

MIDDLEWARE = "rkv_vllm.server.middleware.KvCacheMiddleware"
#: The last one is the outermost.
OPERATIONS = "rkv_vllm.server.operations.OperationsMiddleware"
#: Options of vLLM that select what this package puts in their place.
TAKEN = frozenset({"--scheduler-cls", "--worker-cls"})
SETTINGS = "--additional-config"
PROCESSORS = "--logits-processors"


def serve_arguments(users: list[str], ours: list[str]) -> list[str]:
    """Everything behind `vllm serve`: the user's options, ours, and the middleware for budgets and reports.

    vLLM takes the last of two `--additional-config` and of two `--logits-processors`. The user's JSON is
    therefore rewritten in vLLM's dotted form, which it merges, and the user's processors go behind ours.

    Args:
        users: options of `vllm serve`, the model among them, in any order.
        ours: what `rkv_serve_flags` returned.

    Raises: ValueError for an option that cannot be combined with R-KV.
    """
    merged: list[str] = []
    processors: list[str] = []
    words = deque(users)
    while words:
        word = words.popleft()
        option, equals, value = word.partition("=")
        name = option.replace("_", "-") if option.startswith("--") else option
        if name in TAKEN:
            raise ValueError(f"{name} is set by rkv-vllm and cannot be chosen")
        if name == SETTINGS:
            merged += _dotted(value if equals or not words else words.popleft())
        elif name == PROCESSORS and equals:
            processors.append(value)
        elif name == PROCESSORS:
            while words and not words[0].startswith("-"):
                processors.append(words.popleft())
        else:
            merged.append(word)
    middlewares = [f"--middleware={MIDDLEWARE}", f"--middleware={OPERATIONS}"]
    return [*merged, *_with_processors(ours, processors), *middlewares]


def _dotted(text: str) -> list[str]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or any("." in key for key in settings):
        raise ValueError(f"{SETTINGS} takes a JSON object whose keys have no dots, not {text!r}")
    return [f"{SETTINGS}.{key}={json.dumps(setting)}" for key, setting in settings.items()]


def _with_processors(ours: list[str], processors: list[str]) -> list[str]:
    if not processors:
        return ours
    own = [flag.partition("=")[2] for flag in ours if flag.startswith(f"{PROCESSORS}=")]
    others = [flag for flag in ours if not flag.startswith(f"{PROCESSORS}=")]
    return [PROCESSORS, *own, *processors, *others]
