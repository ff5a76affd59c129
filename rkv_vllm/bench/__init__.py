"""`rkv-vllm bench`: throughput and memory of R-KV against stock vLLM, each in engines of its own."""
