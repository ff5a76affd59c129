"""`rkv-vllm eval`: accuracy by budget, policy and buffer, against the full cache of the same engine."""
