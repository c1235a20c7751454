"""Data formats, tokenisation and metrics of the two tasks: classification and causal language modelling.

The way of a row: `sources.read_rows` -> `schema.load_rows` (checked `Rows`) -> `task.make_task(...).encode`
(`Example`) -> `batches.Batches` (`Batch`) -> model -> `metrics.ScoreSum` -> `Scores`.
"""
