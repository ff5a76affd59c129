"""For GPUs and Model Runner V2."""
