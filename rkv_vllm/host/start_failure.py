"""Why an engine did not start, told to the process that started it.

vLLM logs the exception in the engine core or in one of its workers, some two hundred lines before the end,
and the starting process learns only that something failed. Here the first of these processes to fail writes
the exception's text into a file that the starting process named.
"""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Has the file's path; inherited by all processes of the engine.
VARIABLE = "_RKV_VLLM_START_FAILURE"
#: What vLLM logs, with the exception, where one of an engine's processes fails.
MESSAGES = ("EngineCore failed to start.", "WorkerProc failed to start.", "WorkerProc hit an exception.")
#: How the exception begins that the starting process gets.
FAILED = "Engine core initialization failed."
#: How vLLM's errors begin about a pool that cannot hold a request.
TOO_SMALL = (
    "To serve at least one request with the model's max seq len",
    "No available memory for the cache",
)
#: As for Python's option -W.
TRACKER_WARNING = "ignore::UserWarning:multiprocessing.resource_tracker"


class _FirstFailure(logging.Handler):
    """Writes the exception of the first record about a failure: a worker's, or else its engine core's."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg in MESSAGES and record.exc_info and record.exc_info[1] is not None:
            with suppress(FileExistsError), self._path.open("x") as file:
                file.write(_text(record.exc_info[1]))


def _text(error: BaseException) -> str:
    if isinstance(error, ValueError) and str(error):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def report_failure() -> None:
    """In each of vLLM's processes: tell the one that wants to know."""
    path, logger = os.environ.get(VARIABLE), logging.getLogger("vllm")
    if path and not any(isinstance(handler, _FirstFailure) for handler in logger.handlers):
        logger.addHandler(_FirstFailure(Path(path)))


class StartFailure:
    """The file, for the process that starts an engine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reason(self, error: RuntimeError) -> str | None:
        """The text of the exception behind `error`, which the starting process got; None where that is not
        about a start, or where no process of the engine told one."""
        if not str(error).startswith(FAILED):
            return None
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None


@contextmanager
def awaiting_failure() -> Iterator[StartFailure]:
    """Engines that are started in here tell why they fail."""
    # A tracker of shared memory warns behind everything else of what a killed process left.
    warnings = [*filter(None, [os.environ.get("PYTHONWARNINGS")]), TRACKER_WARNING]
    os.environ["PYTHONWARNINGS"] = ",".join(warnings)
    with tempfile.TemporaryDirectory(prefix="rkv-vllm-") as folder:
        path = Path(folder) / "failure"
        os.environ[VARIABLE] = str(path)
        try:
            yield StartFailure(path)
        finally:
            del os.environ[VARIABLE]
