"""A client's part in secure aggregation."""

from __future__ import annotations

import secrets
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molehill.config import Config
from molehill.errors import MessageError, ResumeError
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

_AGAIN = "The server may begin another attempt."


class Signer(Protocol):
    """Vouches for a client's keys, so that a server cannot put its own in their place."""

    def sign(self, data: bytes) -> str:
        """A proof that these bytes are ours."""
        ...

    def verify(self, name: str, data: bytes, proof: str) -> None:
        """Refuse bytes that are not of the client of this name.

        Raises:
            MolehillError: The proof is missing, wrong, or of somebody else.
        """
        ...


class Vault(Protocol):
    """Keeps one secret of this client through a restart."""

    def load_secret(self) -> bytes | None:
        """The secret that was kept last."""
        ...

    def save_secret(self, data: bytes) -> None:
        """Keep a secret in place of the last one."""
        ...


class _Memory(BaseModel):
    """Where a client is in the protocol; private keys and seeds are hexadecimal."""

    model_config = ConfigDict(extra="forbid")

    round: int
    attempt: int
    stage: Literal["keys", "shares", "masked", "agreed", "done"] = "keys"
    done: int = 0  # the last round in which shares were given away
    shares_key: str = ""
    masks_key: str = ""
    signing_key: str = ""
    seed: str = ""
    adverts: tuple[Advert, ...] = ()
    held: dict[str, tuple[str, str]] = Field(default_factory=dict)  # by owner: our share of its seed, and of its key
    agreed: str = ""  # what it signed; it signs nothing else
    answer: str = ""


class Masker:
    """One client's secrets of one attempt at a round, from its keys to the shares it gives away.

    What it refuses does not depend on the server's word: to mask twice with the same masks, to give away shares of both
    secrets of a client, to help with two sums of one round (their difference would be that of few clients), to help
    with a sum that not enough others have signed for, to take part below the threshold, and to mask among fewer clients
    than the configuration lets it expect.

    Args:
        name: The client's id.
        config: The run.
        vault: Where the secrets lie between two messages.
        signer: Vouches for keys; None takes the server's word for whose they are.
    """

    def __init__(self, name: str, config: Config, vault: Vault, signer: Signer | None = None) -> None:
        self._name = name
        self._config = config
        self._vault = vault
        self._signer = signer

    def keys(self, ask: AskKeys) -> Advert:
        """Make keys for an attempt at a round; secrets of an earlier one are forgotten.

        Raises:
            MessageError: It is for somebody else, or this client has already helped to unmask a sum of this round.
        """
        self._require_addressee(ask.client, ask.run)
        known = self._load()
        done = known.done if known else 0
        if ask.round <= done:
            raise MessageError(
                f"it has already helped to unmask round {done}; another sum of it would give single clients away",
                mend="Go on with the run folder that has the masked sum, or begin a run with another name.",
            )
        shares_key, masks_key, signing_key = keys.new_key(), keys.new_key(), keys.new_signing_key()
        self._save(
            _Memory(
                round=ask.round,
                attempt=ask.attempt,
                done=done,
                shares_key=shares_key.hex(),
                masks_key=masks_key.hex(),
                signing_key=signing_key.hex(),
                seed=secrets.token_hex(keys.KEY),
            )
        )
        advert = Advert(
            client=self._name,
            shares=keys.public(shares_key).hex(),
            masks=keys.public(masks_key).hex(),
            signs=keys.signing_public(signing_key).hex(),
        )
        if self._signer is None:
            return advert
        return advert.model_copy(update={"proof": self._signer.sign(advert.signed(ask.occasion))})

    def shares(self, ask: AskShares) -> Shares:
        """Share the secrets of this attempt among those who take part.

        Raises:
            MessageError: They are too few, or their keys cannot be theirs.
            MolehillError: What the signer says.
        """
        self._require_addressee(ask.client, ask.run)
        memory = self._at("keys", ask.round, ask.attempt)
        self._require_company(ask, memory)
        names = [advert.client for advert in ask.adverts]
        need = needed(self._config, len(names))
        of_seed = shamir.split(bytes.fromhex(memory.seed), need, len(names))
        of_key = shamir.split(bytes.fromhex(memory.masks_key), need, len(names))
        sealed = {}
        for advert, seed, key in zip(ask.adverts, of_seed, of_key, strict=True):
            if advert.client == self._name:
                memory.held[self._name] = (seed.hex(), key.hex())
                continue
            label = ask.occasion.label("shares", self._name, advert.client)
            secret = keys.agree(bytes.fromhex(memory.shares_key), bytes.fromhex(advert.shares), label)
            sealed[advert.client] = keys.seal(seed + key, secret, label).hex()
        memory.adverts, memory.stage = ask.adverts, "shares"
        self._save(memory)
        return Shares(client=self._name, sealed=sealed)

    def ready(self, round_: int, company: Company | None) -> None:
        """Make sure, before the work of a round, that its result can be masked.

        Raises:
            MessageError: It cannot.
        """
        if company is None:
            raise MessageError(
                "the plan asks for a delta in the open, but this run has privacy.secure_aggregation",
                mend="Run the same configuration on server and clients.",
            )
        privacy = self._config.privacy
        cap = privacy.fixed_examples
        if cap is not None and company.cap != cap:
            raise MessageError(
                f"the plan has a client count for {company.cap} examples at most, by privacy it is {cap}",
                mend="Run the same configuration on server and clients.",
            )
        if cap is not None and company.counts is not None:
            raise MessageError(
                f"the plan has a client count for {company.counts} examples, by privacy only its own rows and the "
                f"most of {cap} decide that",
                mend="Run the same configuration on server and clients.",
            )
        memory = self._at("shares", round_, company.attempt)
        known = {advert.client for advert in memory.adverts} - {self._name}
        strangers = sorted(company.inbox.keys() - known)
        if strangers:
            raise MessageError(f"shares from {strangers[0]!r}, who did not advertise a key")
        self._require_enough(1 + len(company.inbox), memory)

    def weight(self, examples: int, company: Company) -> int:
        """How much a client with so many examples counts.

        Raises:
            MessageError: The server has it count for more than it has.
        """
        if company.counts is not None and company.counts > examples:
            raise MessageError(f"the plan has it count for {company.counts} examples, and it has {examples}")
        most = self._config.round.max_rows
        return min(examples, company.cap, company.counts or examples, most if isinstance(most, int) else examples)

    def mask(self, round_: int, company: Company, values: NDArray[np.float64]) -> Numbers:
        """Mask a vector; the secrets allow it once.

        Raises:
            MessageError: Not now, or shares of another client cannot be opened.
        """
        self.ready(round_, company)
        memory = self._at("shares", round_, company.attempt)
        occasion = keys.Occasion(self._config.run.name, round_, company.attempt)
        adverts = {advert.client: advert for advert in memory.adverts}
        for owner, sealed in company.inbox.items():
            label = occasion.label("shares", owner, self._name)
            secret = keys.agree(bytes.fromhex(memory.shares_key), bytes.fromhex(adverts[owner].shares), label)
            opened = keys.unseal(bytes.fromhex(sealed), secret, label)
            memory.held[owner] = (opened[: shamir.SHARE].hex(), opened[shamir.SHARE :].hex())
        numbers = FixedPoint.of(self._config, len(adverts), company.cap).encode(values)
        memory.stage = "masked"
        self._save(memory)  # first: what is masked twice with the same masks is not masked
        add_mask(numbers, bytes.fromhex(memory.seed))
        for other in company.inbox:
            key, theirs = bytes.fromhex(memory.masks_key), bytes.fromhex(adverts[other].masks)
            add_common_mask(numbers, key, self._name, theirs, other, occasion)
        return numbers

    def agree(self, ask: AskAgree) -> Agreement:
        """Sign who is in the sum.

        Asked the same again it signs again; asked anything else it refuses.

        Raises:
            MessageError: It is not what was masked, too few arrived, or another list was signed before.
        """
        self._require_addressee(ask.client, ask.run)
        memory = self._at(("masked", "agreed"), ask.round, ask.attempt)
        text = self._survivors(ask, memory)
        if memory.agreed not in ("", text.hex()):
            raise MessageError("it has signed another list of who is in the sum, and two of them would undo masks")
        memory.stage, memory.agreed = "agreed", text.hex()
        self._save(memory)  # first: a signature that was forgotten could be followed by another one
        return Agreement(client=self._name, signature=keys.sign(text, bytes.fromhex(memory.signing_key)).hex())

    def unmask(self, ask: AskUnmask) -> Unmask:
        """Give away one share of every client that takes part, of its seed or of its key.

        Asked the same again it answers the same; asked anything else it refuses. It need not have signed itself: what
        enough others signed holds for it, too, as long as it has signed nothing else.

        Raises:
            MessageError: It is not what enough of them signed, this client signed something else, or other shares were
                given away before.
        """
        self._require_addressee(ask.client, ask.run)
        memory = self._at(("masked", "agreed", "done"), ask.round, ask.attempt)
        text = self._survivors(ask, memory)
        # Who was away when the list was signed signs nothing else after this, so it has as good as signed it itself.
        if memory.agreed != text.hex() and memory.stage != "masked":
            raise MessageError("it has signed another list of who is in the sum, and two of them would undo masks")
        if memory.stage == "done":
            return Unmask.model_validate_json(memory.answer)
        self._require_agreement(ask, memory, text)
        answer = Unmask(
            client=self._name,
            own={client: memory.held[client][0] for client in sorted(ask.arrived)},
            keys={client: memory.held[client][1] for client in sorted(ask.lost)},
        )
        self._save(
            _Memory(
                round=ask.round,
                attempt=ask.attempt,
                stage="done",
                done=ask.round,
                adverts=memory.adverts,
                held=dict.fromkeys(memory.held, ("", "")),
                agreed=text.hex(),
                answer=answer.model_dump_json(),
            )
        )
        return answer

    def _survivors(self, ask: AskAgree, memory: _Memory) -> bytes:
        """What a question says of who is in the sum, as clients sign it.

        Raises:
            MessageError: No client may agree to that.
        """
        arrived, lost = set(ask.arrived), set(ask.lost)
        if arrived & lost or len(arrived) + len(lost) < len(ask.arrived) + len(ask.lost):
            raise MessageError(
                f"it is asked for both secrets of {min((arrived & lost) or arrived)!r}",
                mend="Of a client that arrived the own mask is taken off, of one that is lost the common ones.",
            )
        if arrived | lost != memory.held.keys() or self._name not in arrived:
            raise MessageError("it is asked about other clients than those it masked with")
        self._require_enough(len(arrived), memory)
        return survivors(ask.occasion, memory.adverts, arrived, lost)

    def _require_agreement(self, ask: AskUnmask, memory: _Memory, text: bytes) -> None:
        """Refuse a sum that not enough of those in it have signed for."""
        signing = {advert.client: bytes.fromhex(advert.signs) for advert in memory.adverts}
        strangers = sorted(ask.signatures.keys() - set(ask.arrived))
        if strangers:
            raise MessageError(f"a signature of {strangers[0]!r}, who is not in the sum")
        need = needed(self._config, len(memory.adverts))
        if len(ask.signatures) < need:
            raise MessageError(
                f"{len(ask.signatures)} clients have signed who is in the sum, fewer than the threshold of {need}"
            )
        for client, signature in ask.signatures.items():
            keys.verify(text, bytes.fromhex(signature), signing[client])

    def _require_addressee(self, client: str, run: str) -> None:
        if (client, run) != (self._name, self._config.run.name):
            raise MessageError(f"a request to {client!r} in run {run!r}, this is {self._name!r}")
        if not self._config.privacy.secure_aggregation:
            raise MessageError(
                "the server asks for secure aggregation, which this run does not have",
                mend="Run the same configuration on server and clients.",
            )

    def _require_company(self, ask: AskShares, memory: _Memory) -> None:
        names = [advert.client for advert in ask.adverts]
        if names != sorted(set(names)):
            raise MessageError("the clients that take part are not in order, or one is there twice")
        floor = needed(self._config, len(names))
        if len(names) < floor:
            raise MessageError(
                f"{len(names)} clients take part, and by data.clients, federation.select and privacy.threshold it "
                f"masks among {floor} or more",
                mend="Start the other clients, or begin a run with as many data.clients as there are.",
            )
        own = [keys.public(bytes.fromhex(key)).hex() for key in (memory.shares_key, memory.masks_key)]
        own.append(keys.signing_public(bytes.fromhex(memory.signing_key)).hex())
        mine = [advert for advert in ask.adverts if advert.client == self._name]
        if [[advert.shares, advert.masks, advert.signs] for advert in mine] != [own]:
            raise MessageError("its own keys are not among those that take part, or were changed")
        everybody = {key for advert in ask.adverts for key in (advert.shares, advert.masks, advert.signs)}
        if len(everybody) < 3 * len(names):
            raise MessageError("two clients have the same key")
        if self._signer is not None:
            for advert in ask.adverts:
                self._signer.verify(advert.client, advert.signed(ask.occasion), advert.proof)

    def _require_enough(self, count: int, memory: _Memory) -> None:
        need = needed(self._config, len(memory.adverts))
        if count < need:
            raise MessageError(
                f"{count} of {len(memory.adverts)} clients are left, fewer than the threshold of {need}", mend=_AGAIN
            )

    def _at(self, stage: str | tuple[str, ...], round_: int, attempt: int) -> _Memory:
        memory = self._load()
        if memory is None or (memory.round, memory.attempt) != (round_, attempt):
            raise MessageError(f"it has no keys for attempt {attempt} at round {round_}", mend=_AGAIN)
        if memory.stage not in ((stage,) if isinstance(stage, str) else stage):
            raise MessageError(f"it is past that: its secrets of round {round_} are {memory.stage!r}", mend=_AGAIN)
        return memory

    def _load(self) -> _Memory | None:
        data = self._vault.load_secret()
        try:
            return None if data is None else _Memory.model_validate_json(data)
        except ValidationError:  # what it gave away in which round must not be forgotten
            raise ResumeError(
                "the secrets of secure aggregation were kept by another version of Molehill",
                mend="Use the version that wrote them, or begin a run with another name.",
            ) from None

    def _save(self, memory: _Memory) -> None:
        self._vault.save_secret(memory.model_dump_json().encode())
