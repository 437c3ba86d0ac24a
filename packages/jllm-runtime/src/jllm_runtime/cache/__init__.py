"""KV caches: contiguous, paged, and shared prefixes."""
