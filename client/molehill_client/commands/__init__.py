"""The verbs that drive a machine with private rows."""
