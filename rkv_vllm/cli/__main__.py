"""`python -m rkv_vllm.cli`, for whoever starts the command with a certain Python."""

from rkv_vllm.cli import app

app()
