"""Many requests at a time: continuous batching over a paged KV cache."""
