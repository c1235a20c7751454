"""The verbs that make bundles and publish them: one module each."""
