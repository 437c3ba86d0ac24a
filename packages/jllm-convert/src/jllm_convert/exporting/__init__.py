"""Export of a checkpoint to a Hugging Face folder."""
