"""Writing of a checkpoint: piece by piece, within a memory budget, whole or not at all."""
