"""What users look at: which tokens a cache has forgotten, and what servers do right now."""
