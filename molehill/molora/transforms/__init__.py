"""Logit transforms: edits between scores and selection."""
