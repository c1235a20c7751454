"""The verbs that make bundles, publish them, and look at adapters: one module each."""
