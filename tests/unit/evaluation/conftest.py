"""What all tests of the evaluation need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """The command tells vLLM, through the environment, where to log; errors name files of any length."""
    with patch.dict(os.environ, COLUMNS="300"):
        yield
