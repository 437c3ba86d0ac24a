"""Hugging Face hub: downloads to its cache or to a folder."""
