"""What a client agreed to, with its owner's policy and its own configuration, and no plan may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from molehill import evidence
from molehill.config import Config
from molehill.errors import ConsentError, MessageError
from molehill.plan import ClientPlan
from molehill.tasks.schema import columns_of
from molehill.wire.keys import Key
from molehill.words import counted
from molehill_client.policy import Policy, Word

if TYPE_CHECKING:
    from molehill.molora.model import MoLoRAModel

_MEND = "Run the same configuration on server and clients."
_AHEAD = 64  # rounds whose sharing is looked at before a run; that of each is looked at again when its plan comes


def require_consent(plan: ClientPlan, config: Config, keys: Iterable[Key], client: str) -> None:
    """Refuse a plan that would have more leave this machine, or more done on it, than its configuration says.

    A plan may ask for less: what it freezes or leaves on the machine tells nobody anything.

    Args:
        plan: The plan.
        config: The client's own copy.
        keys: Of all tensors of its model.
        client: Its id, for the message.

    Raises:
        MessageError: The plan is for another run, shares what is personal or frozen, has another codec or clip, more
            rounds or steps, a higher rank, or more experts per token.
    """
    where = f"client {client}"
    decided = config.federation.policy.build("policy", round_number=plan.round)
    for key in keys:
        if plan.scope(key) != "shared":
            continue
        if key.residual:
            raise MessageError("plan asks for what is personal: residuals never leave a machine", where=where)
        owner = _keeper(key, config, decided)
        if owner:
            raise MessageError(f"plan asks for {key.name}, which {owner} does not share", where=where, mend=_MEND)
    for what in _beyond(plan, config, max(decided.ranks, default=None), max(decided.ks, default=None)):
        raise MessageError(what, where=where, mend=_MEND)


def _beyond(plan: ClientPlan, config: Config, rank: int | None, k: int | None) -> Iterator[str]:
    """What of a plan goes beyond the configuration, whose highest rank and k per client are given where it has some."""
    if plan.run != config.run.name:
        yield f"plan is of run {plan.run!r}, run.name is {config.run.name!r}"
    if plan.round > config.run.rounds:
        yield f"plan is of round {plan.round}, run.rounds is {config.run.rounds}"
    if plan.steps > config.train.steps:
        yield f"plan has {plan.steps} steps, train.steps is {config.train.steps}"
    if plan.codec != config.wire.up:
        yield f"plan has changes encoded as {_named(plan.codec)}, wire.up is {_named(config.wire.up)}"
    if rank is not None and (plan.rank is None or plan.rank > rank):
        yield f"plan has rank {plan.rank or 'without limit'}, federation.policy gives {rank} at most"
    if plan.k is not None and k is None:
        yield f"plan has {plan.k} experts per token, federation.policy leaves that to the selector"
    if k is not None and (plan.k is None or plan.k > k):
        yield f"plan has {plan.k or 'no number of'} experts per token, federation.policy gives {k} at most"
    if plan.clip != config.privacy.clip:
        yield f"plan has changes clipped to {plan.clip}, privacy.clip is {config.privacy.clip}"


def _named(ref: Any) -> str:
    params = ", ".join(f"{name} = {value}" for name, value in ref.params.items())
    return f"{ref.name} ({params})" if params else str(ref.name)


def _keeper(key: Key, config: Config, decided: Any) -> str:
    """The configuration key that keeps a tensor from being shared; empty when none does."""
    scope = decided.of(key.kind)
    if scope is not None:
        return "" if scope == "shared" else "federation.policy"
    part = key.role.partition(".")[2].removeprefix("own.")
    if key.kind == "gate" and part in config.molora.scorer.declared("scorer", "fixed"):
        return "molora.scorer"
    if key.kind == "head":
        return "personal.head" if config.personal.head == "personal" else ""
    kept = config.personal.gate == "personal" or (config.personal.gate in {"anchored", "split"} and key.own)
    return "personal.gate" if kept else ""


class Consent:
    """An owner's policy, held against what a coordinator asks.

    Args:
        word: The policy.
    """

    def __init__(self, word: Word) -> None:
        self._word = word

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the owner's file that may be read."""
        return self._word.policy.data.columns

    def require_run(self, config: Config, *, own_base: bool) -> None:
        """Refuse a run before anything of it is loaded or read.

        Args:
            config: What the coordinator proposes.
            own_base: Whether the owner has chosen the base's folder.

        Raises:
            ConsentError: It asks for more than the policy allows; all of it is named, with keys and lines.
        """
        policy = self._word.policy
        found = [*_protection(policy, config), *_limits(policy, config)]
        if not own_base and not any(fnmatchcase(config.base.model, name) for name in policy.base.models):
            found.append(("base.models", f"base.model is {config.base.model!r}"))
        if strange := sorted(columns_of(config.data, config.task) - {*policy.data.columns}):
            found.append(("data.columns", f"it reads the column {', '.join(map(repr, strange))}"))
        found += self._untold(evidence.asked(config, "run"))
        self._refuse("run", found)

    def require_model(self, config: Config, digest: str, model: MoLoRAModel) -> None:
        """Refuse weights that the policy does not name, and experts and sharing beyond it.

        Args:
            config: The run.
            digest: SHA-256 (hex) of the weights that were loaded.
            model: What was made of them.

        Raises:
            ConsentError: There are some.
        """
        policy = self._word.policy
        named, rank = policy.base.digests, model.highest_rank
        found = []
        if named and digest not in named:
            found.append(("base.digests", f"the base has the weight digest {digest}"))
        if rank > policy.limits.rank:
            found.append(("limits.rank", f"an expert has rank {rank}"))
        for number in _rounds(config):
            if strange := list(_tensors(policy, _kinds(config, number, model.layout), number)):
                found += strange
                break
        self._refuse("run", found)

    def require_plan(self, plan: ClientPlan, keys: Iterable[Key]) -> None:
        """Refuse a plan that asks for more than the policy allows, whatever the configuration says.

        Args:
            plan: The plan.
            keys: Of all tensors of the model.

        Raises:
            ConsentError: It does.
        """
        policy = self._word.policy
        kinds = {key.kind for key in keys if plan.scope(key) == "shared"}
        found = list(_tensors(policy, kinds, plan.round))
        if plan.codec.name not in policy.share.codecs:
            found.append(("share.codecs", f"changes are to be encoded as {plan.codec.name}"))
        if plan.steps > policy.limits.steps:
            found.append(("limits.steps", f"it has {plan.steps} steps"))
        if plan.round > policy.limits.rounds:
            found.append(("limits.rounds", f"it is of round {plan.round}"))
        self._refuse("plan", found)

    def require_told(self, config: Config, moment: evidence.Moment) -> None:
        """Refuse to tell, at a moment, kinds of evidence that the policy does not list.

        Raises:
            ConsentError: There are some.
        """
        self._refuse("request", self._untold(evidence.asked(config, moment)))

    def _untold(self, kinds: list[str]) -> list[tuple[str, str]]:
        tell = self._word.policy.share.tell
        meanings = {kind.name: kind.meaning for kind in evidence.KINDS}
        return [("share.tell", f"it is told {name} ({meanings[name]})") for name in kinds if name not in tell]

    def _refuse(self, what: str, found: list[tuple[str, str]]) -> None:
        if not found:
            return
        reasons = "; ".join(f"{reason}, {self._allowed(key)}" for key, reason in found)
        raise ConsentError(
            f"its owner's policy refuses this {what}: {reasons}",
            where=self._word.lines.find(found[0][0]),
            mend="Ask for less, or ask the owner.",
        )

    def _allowed(self, key: str) -> str:
        """What the policy says at a key, and in which line."""
        section, name = key.split(".")
        value = getattr(getattr(self._word.policy, section), name)
        said = (", ".join(map(str, value)) or "nothing") if isinstance(value, tuple) else str(value)
        line = self._word.lines.number([section, name])
        return f"{key} is {said} (line {line})" if line else f"{key} is {said} unless the policy says otherwise"


def agreement(
    config: Config,
    digest: str,
    model: MoLoRAModel,
    columns: Collection[str],
    word: Word | None,
) -> dict[str, Any]:
    """What a run may do on this machine, in plain values.

    Args:
        config: The run.
        digest: Of the base's weights.
        model: What was made of it.
        columns: Of the owner's file that are read.
        word: The owner's policy; None where it is the configuration alone that counts.
    """
    kinds = {kind for number in _rounds(config) for kind in _kinds(config, number, model.layout)}
    moments: tuple[evidence.Moment, ...] = ("run", "train.baseline", "evaluate")
    told = [name for moment in moments for name in evidence.asked(config, moment)]
    return {
        "run": config.run.name,
        "configuration": config.digest,
        "base": config.base.model,
        "weights": digest,
        "columns": sorted(columns),
        "rounds": config.run.rounds,
        "steps": config.train.steps,
        "rank": model.highest_rank,
        "shares": sorted(kinds),
        "codec": _named(config.wire.up),
        "tells": [name for name in told if word is None or name in word.policy.share.tell],
        "secure aggregation": config.privacy.secure_aggregation,
        "clip": config.privacy.clip,
        "policy": None if word is None else word.digest,
    }


def digest_of(agreed: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of an agreement."""
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()


def in_words(agreed: Mapping[str, Any]) -> str:
    """An agreement as one sentence."""
    guards = " and ".join(name for name in ("secure aggregation", "clip") if agreed[name])
    shares = ", ".join(agreed["shares"]) or "nothing"
    under = f"policy {agreed['policy'][:12]}" if agreed["policy"] else "no policy of its own"
    work = f"{counted(agreed['rounds'], 'round')} of {counted(agreed['steps'], 'step')}"
    return (
        f"agreed to run {agreed['run']!r}: at most {work} on "
        f"{agreed['base']} (weights {agreed['weights'][:12]}), rank {agreed['rank']}; it reads "
        f"{', '.join(agreed['columns'])}; it shares {shares} as {agreed['codec']} with "
        f"{guards or 'neither secure aggregation nor a clip'}; it tells {', '.join(agreed['tells'])}. "
        f"Under {under}; agreement {digest_of(agreed)[:12]}"
    )


def _protection(policy: Policy, config: Config) -> Iterator[tuple[str, str]]:
    clip, needs = config.privacy.clip, policy.protection.needs
    clipped = clip is not None and clip <= policy.protection.clip
    masked = config.privacy.secure_aggregation
    enough = {
        "secure-aggregation": masked,
        "clip": clipped,
        "either": masked or clipped,
        "both": masked and clipped,
        "nothing": True,
    }
    if enough[needs]:
        return
    parts = [] if masked else ["no secure aggregation"]
    parts += ["no clip"] if clip is None else [] if clipped else [f"a clip of {clip:g}"]
    key = "protection.needs" if clip is None or clipped else "protection.clip"
    yield key, f"it has {' and '.join(parts)}"


def _limits(policy: Policy, config: Config) -> Iterator[tuple[str, str]]:
    for name, values in {
        "rounds": {"run.rounds": config.run.rounds},
        "steps": {"train.steps": config.train.steps, "personal.steps": config.personal.steps},
        "rank": {"molora.rank": config.molora.rank},
    }.items():
        for key, value in values.items():
            if value > getattr(policy.limits, name):
                yield f"limits.{name}", f"{key} is {value}"
    for each in config.personal.candidates:
        candidate, limits = each.build("candidate"), policy.limits
        steps, rounds = candidate.steps(config), limits.rounds if candidate.starts_over else 1
        if steps > rounds * limits.steps:
            yield "limits.steps", f"{each.name} of personal.candidates takes {steps}"
    if config.wire.up.name not in policy.share.codecs:
        yield "share.codecs", f"wire.up is {config.wire.up.name}"


def _tensors(policy: Policy, kinds: Iterable[str], number: int) -> Iterator[tuple[str, str]]:
    if strange := sorted({*kinds} - {*policy.share.tensors}):
        yield "share.tensors", f"round {number} shares {', '.join(strange)}"


def _rounds(config: Config) -> range:
    return range(1, min(config.run.rounds, _AHEAD) + 1)


def _kinds(config: Config, number: int, keys: Iterable[Key]) -> set[str]:
    """Kinds of tensors that a round shares by the configuration."""
    decided = config.federation.policy.build("policy", round_number=number)
    return {key.kind for key in keys if not key.residual and not _keeper(key, config, decided)}
