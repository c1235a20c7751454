"""A lab machine: a long-lived trainer and a thin ClientApp."""
