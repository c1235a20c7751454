"""The verbs that need no part of the house: one module each."""
