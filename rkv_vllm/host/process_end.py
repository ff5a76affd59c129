"""How a process that has imported vLLM ends."""

from __future__ import annotations

import atexit
import gc
from multiprocessing import parent_process


def skip_last_collections() -> None:
    """Lets Python end this process without looking for garbage.

    After vLLM's modules are imported there are most of a million objects, and an interpreter that ends goes
    through all of them several times: that is seconds for each process, one after the other, while a server
    is waited for. What it would free goes back to the operating system at once.
    """
    atexit.register(gc.freeze)


def skip_last_collections_of_engine() -> None:
    """The same for a process of the engine, unless the engine lives in its user's own process."""
    if parent_process() is not None:
        skip_last_collections()
