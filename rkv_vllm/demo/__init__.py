"""`rkv-vllm demo`: four streamed chat completions with different KV budgets, on a small model and a CPU."""
