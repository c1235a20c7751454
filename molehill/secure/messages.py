"""What server and clients tell each other before and after the masked vectors; small, and validated as it comes in."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molehill.secure.keys import KEY, OVERHEAD, Occasion
from molehill.secure.shamir import SHARE

LEAST = 3  # clients: of two, each knows what the other sent once it sees the sum

PublicKey = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY}}}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE}}}$")]
SealedShares = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (2 * SHARE + OVERHEAD)}}}$")]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Request(_Message):
    run: str
    round: int = Field(ge=1)
    attempt: int = Field(ge=0)
    client: str

    @property
    def occasion(self) -> Occasion:
        """What the keys of this request are for."""
        return Occasion(self.run, self.round, self.attempt)


class AskKeys(_Request):
    """``query.keys``: make keys for an attempt at a round.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        client: Whom it is for.
    """


class Advert(_Message):
    """The answer: a client's public keys.

    Attributes:
        client: Whose.
        shares: Key for the shares sent to it.
        masks: Key for the masks it has in common with others.
        proof: That they are the client's, as its signer writes it; empty without one.
    """

    client: str
    shares: PublicKey
    masks: PublicKey
    proof: str = Field(default="", max_length=2**14)

    def signed(self, occasion: Occasion) -> bytes:
        """What the proof is about."""
        return occasion.label("advert", self.client, self.shares, self.masks)


class AskShares(_Request):
    """``query.shares``: share your secrets among these clients.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        client: Whom it is for.
        adverts: Of all clients that take part; the n-th, by name, holds the n-th share of every secret.
    """

    adverts: tuple[Advert, ...] = Field(max_length=4096)


class Shares(_Message):
    """The answer.

    Attributes:
        client: Whose secrets.
        sealed: The shares for every other client, encrypted for it.
    """

    client: str
    sealed: dict[str, SealedShares]


class Company(_Message):
    """Part of a ``train`` plan: whose masks to add.

    Attributes:
        attempt: Attempt at the round.
        cap: Most examples that a client counts for.
        inbox: From every other client that has shared its secrets, the shares for this one.
    """

    attempt: int = Field(ge=0)
    cap: int = Field(ge=1, le=2**40)
    inbox: dict[str, SealedShares]


class AskUnmask(_Request):
    """``query.unmask``: help to take the masks off the sum.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        client: Whom it is for.
        arrived: Clients that are in the sum; their own masks are to be taken off.
        lost: Clients that shared their secrets and are not in the sum; what they have in common with the others is.
    """

    arrived: tuple[str, ...] = Field(max_length=4096)
    lost: tuple[str, ...] = Field(max_length=4096)


class Unmask(_Message):
    """The answer.

    Attributes:
        client: Who holds the shares.
        own: Its share of the own mask of every client that arrived.
        keys: Its share of the key of every client that is lost.
    """

    client: str
    own: dict[str, Share]
    keys: dict[str, Share]


def threshold(clients: int, fraction: float) -> int:
    """How many of the clients that take part must stay to the end, and how many shares give a secret back.

    Never fewer than `LEAST`, or a sum could be of two. More than half: then no two disjoint groups of clients exist
    that could be told different stories, one to give away a client's own mask and one to give away its key.
    """
    return max(LEAST, clients // 2 + 1, math.ceil(fraction * clients - 1e-9))
