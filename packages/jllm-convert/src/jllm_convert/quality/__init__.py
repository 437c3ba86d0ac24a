"""Quality of a quantised model: the choice of the quantisation, and the quality receipt."""
