"""TPU backend: Pallas kernels."""
