"""Diagnostics: they look at routes, add up, and merge over clients. Padding never counts."""
