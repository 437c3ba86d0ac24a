"""GPU backend: a Pallas kernel for attention, and attention in blocks."""
