"""The HTTP layer around vLLM's own OpenAI application."""
