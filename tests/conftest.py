"""One Triton for the whole test run."""

import os

import torch

# Triton reads this while it is imported, and vLLM, which the engine's tests use, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
