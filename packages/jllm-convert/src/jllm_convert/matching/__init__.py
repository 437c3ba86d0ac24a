"""Matching of source tensors to arrays of the model, exactly once each."""
