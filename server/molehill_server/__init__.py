"""The coordinator: planning, the round loop, aggregation, checkpoints."""
