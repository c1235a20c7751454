"""Regularisers: what holds local training near the weights a client received; ``train.prox`` sets the one there is."""
