"""Collects the tests that the machine can run."""

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_on_gpu.py"]
