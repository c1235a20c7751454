"""The verbs that drive bundles on a device: ``molehill edge ...``, one module each."""
