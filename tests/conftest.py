"""One Triton for the whole test run, and helpers that tests of several folders import by name."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

# No test measures time: an example may take as long as a busy machine needs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Triton reads this while it is imported, and vLLM, which the engine's tests use, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Its handler keeps the stream of its first import: not that of a command under test, which gets closed.
import vllm.logger  # noqa: E402, F401

sys.path.insert(0, str(Path(__file__).parent))
