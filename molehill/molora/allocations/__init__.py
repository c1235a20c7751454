"""Allocations: how many experts of which rank every site gets."""
