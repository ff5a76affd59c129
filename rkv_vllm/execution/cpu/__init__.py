"""For vLLM's CPU build and its V1 model runner."""
