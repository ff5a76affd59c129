"""One Triton for the whole test run, and examples that may take their time."""

import logging
import os
import sys

import pytest
import torch
from hypothesis import settings

# No test measures time: an example may take as long as a busy machine needs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Triton reads this while it is imported, and vLLM, which the engine's tests use, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _vllm_logs_to_an_open_stream() -> None:
    """A command run by a test before may have bound vLLM's log to its own output, which is closed by now."""
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # not one of pytest's, which are kinds of it
            handler.stream = sys.__stderr__  # setStream would flush the closed one
