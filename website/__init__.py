"""Documentation site: its pages made from notebooks, from the commands' help and from the packages' docstrings."""
