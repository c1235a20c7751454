"""A federation in one process: grid, partitioners, scenarios, sample data and the run report."""
