"""Matching of source tensors to arrays of the model, and tensor layouts."""
