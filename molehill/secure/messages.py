"""What server and clients tell each other before and after the masked vectors; small, and validated as it comes in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molehill.secure.keys import KEY, OVERHEAD, SIGNATURE, Occasion
from molehill.secure.shamir import SHARE

LEAST = 3  # clients: of two, each knows what the other sent once it sees the sum

PublicKey = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY}}}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE}}}$")]
Signature = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SIGNATURE}}}$")]
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
        signs: Key by which others know what it signs in this attempt.
        proof: That they are the client's, as its signer writes it; empty without one.
    """

    client: str
    shares: PublicKey
    masks: PublicKey
    signs: PublicKey
    proof: str = Field(default="", max_length=2**14)

    def signed(self, occasion: Occasion) -> bytes:
        """What the proof is about."""
        return occasion.label("advert", self.client, self.shares, self.masks, self.signs)


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
        counts: Examples that this client counts for, at most its own; None leaves it to its own and the
            cap, and must be where the configuration has the cap fixed.
        inbox: From every other client that has shared its secrets, the shares for this one.
    """

    attempt: int = Field(ge=0)
    cap: int = Field(ge=1, le=2**40)
    counts: int | None = Field(default=None, ge=1)
    inbox: dict[str, SealedShares]


class AskAgree(_Request):
    """``query.agree``: sign who is in the sum, so that nobody is told another story.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        client: Whom it is for.
        arrived: Clients that are in the sum; their own masks will be taken off.
        lost: Clients that shared their secrets and are not in the sum; what they have in common with the others will.
    """

    arrived: tuple[str, ...] = Field(max_length=4096)
    lost: tuple[str, ...] = Field(max_length=4096)


class Agreement(_Message):
    """The answer.

    Attributes:
        client: Who signed.
        signature: Over `survivors`, with the key that it advertised.
    """

    client: str
    signature: Signature


class AskUnmask(AskAgree):
    """``query.unmask``: help to take the masks off the sum that was agreed upon.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        client: Whom it is for.
        arrived: See `AskAgree`.
        lost: See `AskAgree`.
        signatures: Of those that signed, by client.
    """

    signatures: dict[str, Signature] = Field(max_length=4096)


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


def survivors(occasion: Occasion, adverts: Sequence[Advert], arrived: Iterable[str], lost: Iterable[str]) -> bytes:
    """What clients sign: everybody's keys, who is in the sum, and who is not.

    The keys are part of it, so that those who sign agree on how many take part and on how many must stay, too.
    """
    keys = [(advert.client, advert.shares, advert.masks, advert.signs) for advert in adverts]
    text = json.dumps([keys, sorted(arrived), sorted(lost)])
    return occasion.label("survivors", hashlib.sha256(text.encode()).hexdigest())


def threshold(clients: int, fraction: float) -> int:
    """How many clients must stay to the end, how many must have signed so, and how many shares give a secret back.

    Never fewer than `LEAST`, or a sum could be of two. More than two thirds of all, whatever the fraction: with t of n
    on each of two lists, 2 t - n of them are on both, and every honest client signs one list only. So a server that
    tells different stories needs 2 t - n accomplices among the clients, which is more than a third of them.

    Args:
        clients: n, how many there are.
        fraction: Part of them.
    """
    return max(LEAST, 2 * clients // 3 + 1, math.ceil(fraction * clients - 1e-9))
