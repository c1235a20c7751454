"""Spaces: what is combined."""
