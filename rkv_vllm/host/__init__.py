"""Everything that knows a release of vLLM."""
