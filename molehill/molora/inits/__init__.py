"""Start values of low-rank experts. B is zero in all of them, so a fresh model is the base model."""
