"""The verbs that drive a coordinator, and what it leaves: one module each."""
