"""Quality of a quantised model: the grid it is rounded to, and the receipt that says what it cost."""
