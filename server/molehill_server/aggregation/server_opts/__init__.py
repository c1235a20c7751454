"""Server optimisers: the mean change of a round as a gradient."""
