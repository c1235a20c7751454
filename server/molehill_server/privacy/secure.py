"""The server's part in secure aggregation: who takes part, the masked sum, and how the masks come off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molehill.config import Config
from molehill.errors import FederationError, MessageError
from molehill.plan import ClientPlan, ClientReply
from molehill.secure import keys, shamir
from molehill.secure.company import needed
from molehill.secure.fixed import FixedPoint
from molehill.secure.masks import Numbers, add_common_mask, add_mask
from molehill.secure.messages import (
    Advert,
    Agreement,
    AskAgree,
    AskKeys,
    AskShares,
    AskUnmask,
    Company,
    Shares,
    Unmask,
    survivors,
)
from molehill.secure.vector import Form, Sums, figures_of
from molehill.wire.message import decode_masked, largest_masked
from molehill.wire.tree import Layout, Tree
from molehill_server.records import Global, Update
from molehill_server.validation import require_announced

M = TypeVar("M", bound=BaseModel)


class Progress(BaseModel):
    """What an attempt needs once its sum is complete; may be written to disk, since it holds no secret.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at it.
        cap: Most examples a client counts for.
        examples: Training rows that every client that is asked counts for.
        adverts: Of all clients that advertised keys, by name and in its order.
        sharers: Those who shared their secrets.
        arrived: Those who are in the sum.
        signatures: Of those that have signed who is in the sum.
    """

    model_config = ConfigDict(extra="forbid")

    run: str
    round: int
    attempt: int
    cap: int
    examples: dict[str, int]
    adverts: dict[str, Advert] = Field(default_factory=dict)
    sharers: list[str] = Field(default_factory=list)
    arrived: list[str] = Field(default_factory=list)
    signatures: dict[str, str] = Field(default_factory=dict)


class SecureRound:
    """One attempt at a round; see `molehill.secure`.

    Args:
        config: The run.
        layout: What every client shares.
        progress: How far it got.
        total: Sum of the masked vectors of those that arrived, ``[n]``.
    """

    def __init__(self, config: Config, layout: Layout, progress: Progress, total: Numbers | None = None) -> None:
        self.progress = progress
        self._config = config
        self._figures = figures_of(config)
        self._form = Form(layout, len(self._figures))
        self.total = np.zeros(self._form.size, np.uint64) if total is None else total
        self._shares: dict[str, Shares] = {}
        self._answers: dict[str, Unmask] = {}

    @classmethod
    def begin(
        cls, config: Config, layout: Layout, number: int, attempt: int, examples: Mapping[str, int]
    ) -> SecureRound:
        """A new attempt.

        Args:
            config: The run.
            layout: What every client shares.
            number: Round number.
            attempt: Attempt at it.
            examples: Training rows that every client that is asked counts for.

        Raises:
            MessageError: The sum of so many clients with so many rows would be too coarse.
        """
        cap = config.privacy.fixed_examples or max([1, *examples.values()])
        FixedPoint.of(config, len(examples), cap)  # better refused here than by every client after its work
        progress = Progress(run=config.run.name, round=number, attempt=attempt, cap=cap, examples=dict(examples))
        return cls(config, layout, progress)

    @property
    def threshold(self) -> int:
        """How many clients must stay to the end."""
        return needed(self._config, len(self.progress.adverts))

    @property
    def answers(self) -> int:
        """How many clients have given their shares away."""
        return len(self._answers)

    # Questions

    def ask_keys(self) -> dict[str, AskKeys]:
        """The first question, to every client."""
        return {client: AskKeys(**self._to(client)) for client in self.progress.examples}

    def ask_shares(self) -> dict[str, AskShares]:
        """The second, to those that advertised keys."""
        adverts = dict(sorted(self.progress.adverts.items()))
        self.progress.adverts = adverts
        return {client: AskShares(**self._to(client), adverts=tuple(adverts.values())) for client in adverts}

    def companies(self) -> dict[str, Company]:
        """What to add to the plans of those that shared their secrets."""
        self.progress.sharers = sorted(self._shares)
        fixed = self._config.privacy.fixed_examples is not None
        return {
            client: Company(
                attempt=self.progress.attempt,
                cap=self.progress.cap,
                counts=None if fixed else self.progress.examples[client],
                inbox={owner: said.sealed[client] for owner, said in self._shares.items() if owner != client},
            )
            for client in self.progress.sharers
        }

    def ask_agree(self) -> dict[str, AskAgree]:
        """The last question but one, to those that arrived and have not answered it."""
        arrived, lost = self._survivors()
        return {
            client: AskAgree(**self._to(client), arrived=arrived, lost=lost)
            for client in arrived
            if client not in self.progress.signatures
        }

    def ask_unmask(self) -> dict[str, AskUnmask]:
        """The last question, to those that arrived and have not answered it."""
        arrived, lost = self._survivors()
        signed = self.progress.signatures
        return {
            client: AskUnmask(**self._to(client), arrived=arrived, lost=lost, signatures=signed)
            for client in arrived
            if client not in self._answers
        }

    def _survivors(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who is in the sum, and who else the others have masked with."""
        arrived = tuple(sorted(self.progress.arrived))
        return arrived, tuple(client for client in self.progress.sharers if client not in arrived)

    @property
    def _occasion(self) -> keys.Occasion:
        return keys.Occasion(self.progress.run, self.progress.round, self.progress.attempt)

    def _to(self, client: str) -> dict[str, Any]:
        progress = self.progress
        return {"run": progress.run, "round": progress.round, "attempt": progress.attempt, "client": client}

    # Answers

    def take_keys(self, client: str, text: str) -> None:
        """Note the keys of a client.

        Raises:
            MessageError: The answer is malformed or another client's.
        """
        self.progress.adverts[client] = _read(Advert, client, text)

    def take_shares(self, client: str, text: str) -> None:
        """Note the shares of a client.

        Raises:
            MessageError: The answer is malformed, another client's, or leaves somebody out.
        """
        said = _read(Shares, client, text)
        if said.sealed.keys() != self.progress.adverts.keys() - {client}:
            raise MessageError("its shares are not for the clients that take part")
        self._shares[client] = said

    @property
    def largest(self) -> int:
        """Most bytes of a masked vector."""
        return largest_masked(self._form.size)

    def add(self, plan: ClientPlan, blob: bytes, reply: ClientReply) -> None:
        """Add a masked vector to the sum.

        Raises:
            MessageError: It is malformed, or of another client, round, attempt or layout.
        """
        require_announced(blob, reply)
        masked = decode_masked(blob, self._config.wire.max_bytes, self._form.size)
        told = {
            "run": plan.run,
            "round": plan.round,
            "attempt": self.progress.attempt,
            "client": plan.client,
            "base": plan.base,
            "layout": self._form.layout.digest,
        }
        for name, value in told.items():
            if getattr(masked, name) != value:
                raise MessageError(f"its masked vector says {name} = {getattr(masked, name)!r}, not {value!r}")
        self.total += masked.numbers
        self.progress.arrived.append(plan.client)

    def take_agreement(self, client: str, text: str) -> None:
        """Note that a client has signed who is in the sum.

        Raises:
            MessageError: The answer is malformed, another client's, or no signature of that.
        """
        said = _read(Agreement, client, text)
        progress = self.progress
        data = survivors(self._occasion, tuple(progress.adverts.values()), *self._survivors())
        keys.verify(data, bytes.fromhex(said.signature), bytes.fromhex(progress.adverts[client].signs))
        progress.signatures[client] = said.signature

    def take_unmask(self, client: str, text: str) -> None:
        """Note the shares that a client gives away.

        Raises:
            MessageError: The answer is malformed, another client's, or to another question.
        """
        said = _read(Unmask, client, text)
        arrived = set(self.progress.arrived)
        if said.own.keys() != arrived or said.keys.keys() != set(self.progress.sharers) - arrived:
            raise MessageError("it gives away other shares than it was asked for")
        self._answers[client] = said

    # The sum

    def finish(self) -> tuple[Sums, dict[str, float]]:
        """Take the masks off.

        Returns:
            The sums, and the mean of every figure over examples.

        Raises:
            FederationError: A share was wrong, or a client masked with other secrets than it shared.
        """
        progress = self.progress
        try:
            self._take_off()
        except MessageError as error:
            raise FederationError(f"the sum cannot be unmasked: {error}", where=f"round {progress.round}") from None
        sums = self._form.read(FixedPoint.of(self._config, len(progress.adverts), progress.cap).decode(self.total))
        weight = sum(min(progress.examples[client], progress.cap) for client in progress.arrived)
        if sums.weight != weight:  # whole numbers below 2^53, so exact unless a mask is left
            raise FederationError(
                "the masks do not cancel: somebody masked with other secrets than it shared, or with another weight",
                where=f"round {progress.round}",
                mend="No client can be named, and no round has two sums: begin a run with another name, and with "
                "smaller groups of clients to find it.",
            )
        return sums, {name: figure / weight for name, figure in zip(self._figures, sums.figures, strict=True)}

    def _take_off(self) -> None:
        progress, adverts = self.progress, self.progress.adverts
        names = list(adverts)
        helpers = sorted(self._answers, key=names.index)[: self.threshold]

        def secret(part: str, owner: str) -> bytes:
            shares = {1 + names.index(one): getattr(self._answers[one], part)[owner] for one in helpers}
            return shamir.join({number: bytes.fromhex(share) for number, share in shares.items()})

        for client in progress.arrived:
            add_mask(self.total, secret("own", client), subtract=True)
        for client in set(progress.sharers) - set(progress.arrived):
            key = secret("keys", client)
            if keys.public(key).hex() != adverts[client].masks:
                raise MessageError(f"the shares of the key of {client!r} do not give the key it advertised")
            for other in progress.arrived:  # as if it had sent zeros
                theirs = bytes.fromhex(adverts[other].masks)
                add_common_mask(self.total, key, client, theirs, other, self._occasion)


def released(sums: Sums, glob: Global, layout: Layout) -> Update:
    """The mean as if one client had sent it: an expert that nobody used counts as one without tokens."""
    values = glob.tree.select(layout)
    values.flat[:] = (values.flat + sums.mean(layout)).astype(np.float32)
    return Update("the sum", Tree(layout, values.flat), examples=1, tokens=sums.experts)


def _read(kind: type[M], client: str, text: str) -> M:
    try:
        said = kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise MessageError(f"malformed answer, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if said.client != client:  # type: ignore[attr-defined]  # every answer says whose it is
        raise MessageError(f"the answer is of client {said.client!r}")  # type: ignore[attr-defined]  # the same
    return said
