"""Quantised weights of published models, dequantised as they are read."""
