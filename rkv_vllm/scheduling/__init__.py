"""What runs inside vLLM's engine core."""
