"""Routing losses: extra gradient for the router. Each is a mean over records, and padding never counts."""
