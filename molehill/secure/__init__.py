"""Secure aggregation: the server learns the sum of what clients send, and nothing of a single one.

The protocol is that of Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning
(https://doi.org/10.1145/3133956.3133982), with its consistency check: every client adds a mask of its own and, with
every other client, a mask that cancels in the sum; secrets are shared among the clients, so that the masks of those who
vanish can be taken off. Before a client gives shares away it wants to see that enough others have signed the same list
of who is in the sum, so that a server cannot tell each of them another story.

Flower has primitives for it (``flwr.common.secure_aggregation``). They are not used: only one module per part may
import Flower, and both sides need these; its Shamir shares go byte block by byte block through a thread pool, and its
masks come from a generator of statistics, not of cryptography.
"""
