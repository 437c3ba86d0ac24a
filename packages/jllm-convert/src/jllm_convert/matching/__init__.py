"""Tensors of a source matched to arrays of the model, and the layout of each."""
