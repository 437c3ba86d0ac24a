"""Weights that come in few bits, read as the numbers that they stand for."""
