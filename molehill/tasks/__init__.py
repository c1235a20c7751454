"""Data formats, tokenisation and metrics of the two tasks: classification and causal language modelling."""
