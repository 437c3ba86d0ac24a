"""Numbers in few bits: weight matrices, the grids they are rounded to, cached keys and values."""
