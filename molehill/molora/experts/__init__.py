"""Kinds of experts; each kind is a bank that holds all experts of one site."""
