"""Rules: how much each client counts."""
