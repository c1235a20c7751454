"""Lowers: how a combined product comes back to factors of the shared rank."""
