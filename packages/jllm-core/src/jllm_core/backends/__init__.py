"""Backends: replacements for parts of the forward pass, one folder a kind of device."""
