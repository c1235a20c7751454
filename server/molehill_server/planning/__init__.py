"""Who takes part in a round, and what every client is told to do."""
