"""What a worker tells the scheduler: which pages left. Pure data, pickled with vLLM's ModelRunnerOutput."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

#: Attribute of vLLM's ModelRunnerOutput that carries the reports.
_ATTRIBUTE = "rkv_page_reports"


@dataclass(frozen=True, slots=True)
class PageReport:
    """The outcome of one `PageEviction`.

    Attributes:
        request_id: vLLM's id of the request.
        sequence: of the eviction.
        pages: ids of the pages that left, in the order in which the request held them.
    """

    request_id: str
    sequence: int
    pages: tuple[int, ...]


def with_reports(model_output: Any, reports: Sequence[PageReport]) -> Any:
    """The step's output with the reports on it: a copy, because vLLM shares one empty output."""
    model_output = copy(model_output)
    setattr(model_output, _ATTRIBUTE, tuple(reports))
    return model_output


def reports_of(model_output: Any) -> tuple[PageReport, ...]:
    """The reports that came with a step's output; none with most."""
    return getattr(model_output, _ATTRIBUTE, ())
