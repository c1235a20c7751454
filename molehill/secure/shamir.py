"""Shamir's secret sharing over the prime field of 2^521 - 1 (Shamir 1979, https://doi.org/10.1145/359168.359176)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from molehill.errors import MessageError

SECRET = 32  # bytes
SHARE = 66  # bytes

_P = 2**521 - 1  # a Mersenne prime, so no constant has to be believed


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Share a secret of 32 bytes.

    Args:
        secret: The secret.
        threshold: How many shares give it back; fewer say nothing about it.
        holders: How many shares to make.

    Returns:
        The shares of holders 1, 2, .. in their order, 66 bytes each.
    """
    coefficients = [*(secrets.randbelow(_P) for _ in range(threshold - 1)), int.from_bytes(secret)]
    shares = []
    for x in range(1, holders + 1):
        y = 0
        for coefficient in coefficients:
            y = (y * x + coefficient) % _P
        shares.append(y.to_bytes(SHARE))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret from the shares of as many holders as its threshold asks for, by holder's number (from 1).

    Raises:
        MessageError: A share is damaged, or there are too few (as far as that can be seen).
    """
    holders = tuple(sorted(shares))
    weights = _at_zero(holders)
    total = sum(weight * int.from_bytes(shares[holder]) for weight, holder in zip(weights, holders, strict=True)) % _P
    if total >> 8 * SECRET:
        raise MessageError("the shares do not belong together", mend="One of them is damaged, or they are too few.")
    return total.to_bytes(SECRET)


@lru_cache(maxsize=16)  # the secrets of a round are mostly put together from shares of the same holders
def _at_zero(points: Sequence[int]) -> list[int]:
    """Weights with which the values of a polynomial at these points give its value at 0."""
    weights = []
    for own in points:
        above = below = 1
        for other in points:
            if other != own:
                above = above * other % _P
                below = below * (other - own) % _P
        weights.append(above * pow(below, -1, _P) % _P)
    return weights
