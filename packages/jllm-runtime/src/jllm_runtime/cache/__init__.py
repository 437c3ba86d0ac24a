"""KV caches: contiguous, paged, and shared prefixes; states of delta nets."""
