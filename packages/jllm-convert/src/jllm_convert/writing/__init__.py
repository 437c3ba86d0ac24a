"""Writing of a checkpoint: piece by piece, within a memory budget, complete or not at all."""
