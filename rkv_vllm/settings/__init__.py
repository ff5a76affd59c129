"""What users may ask for; imports neither vLLM nor torch."""
