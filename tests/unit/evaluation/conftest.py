"""What all tests of the evaluation need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

# Tests import the module beside this file by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """The command tells vLLM, through the environment, where to log."""
    with patch.dict(os.environ):
        yield
