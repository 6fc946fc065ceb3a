"""Questions with options, answered by a causal language model."""
