"""How many bytes a run sends: what it would send is encoded, with zeros in it, or noise where the codec compresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from molehill.config import Config, MethodRef
from molehill.molora.model import MoLoRAModel
from molehill.plan import ClientPlan, scope_of
from molehill.secure.vector import Form, figures_of
from molehill.wire.keys import NO_EXPERT
from molehill.wire.message import Delta, Masked, encode_delta, encode_masked, encode_tree
from molehill.wire.tree import Layout, Tree
from molehill.words import counted
from molehill_server.broadcast import groups
from molehill_server.check.conflict import asked
from molehill_server.planning.planner import Planner, expected, scopes, shares
from molehill_simulation.text import megabytes, storage

_NOISE = 1e-3  # of the numbers that stand for changes and values


@dataclass(frozen=True)
class Traffic:
    """Bytes of a run, as its own events count them.

    Attributes:
        asked: Clients of a round; on average, where that is left to chance.
        rounds: Of the run.
        up: What one client sends in a round, of each kind of client in turn; of the first round and of the second.
        first: What a client fetches when it takes part for the first time.
        later: What it fetches after a round that it took part in, of the first kind and of the second, without patches.
        varies: The codecs compress: it is what random numbers take, and others take less or more.
        patched: Patches come on top of what is fetched, and grow.
        masked: What is sent up is masked.
        largest: Bytes of the largest message, as it is sent or as float32, which ``wire.max_bytes`` must allow.
    """

    asked: int
    rounds: int
    up: tuple[tuple[int, ...], ...]
    first: int
    later: tuple[int, ...]
    varies: bool
    patched: bool
    masked: bool
    largest: int

    @property
    def round_up(self) -> tuple[int, ...]:
        """What all clients of a round send, of the first round and of the second."""
        return tuple(round(self.asked * sum(each) / len(each)) for each in self.up)

    @property
    def total_up(self) -> int:
        """What all clients send in all rounds; rounds of two kinds take turns."""
        return _in_turns(self.round_up, self.rounds)

    @property
    def total_down(self) -> int:
        """What all clients fetch in all rounds, when the same take part in each."""
        return self.asked * (self.first + _in_turns(self.later, self.rounds - 1))

    @property
    def words(self) -> Iterator[tuple[str, str]]:
        """Labelled facts."""
        about = "about " if self.varies else ""
        among, runs = counted(self.asked, "client"), counted(self.rounds, "round")
        each = " or ".join(dict.fromkeys(_ends(sizes) for sizes in self.up))
        total = " or ".join(dict.fromkeys(_size_of(size) for size in self.round_up))
        yield "up", f"{about}{each} of a client in a round, {total} of {among}, {_size_of(self.total_up)} in {runs}"
        grows = " without patches" if self.patched else ""
        then = " or ".join(dict.fromkeys(_size_of(size) for size in self.later))
        again = f", then {then} a round{grows}" if self.rounds > 1 else grows
        yield "down", f"{about}{_size_of(self.first)} to a client at first{again}, {_size_of(self.total_down)} in all"
        left = ["plans and answers", "what final scores need", "rounds that are tried again"]
        left += ["exchanges of keys"] if self.masked else []
        left += ["patches, which grow with the rounds"] if self.patched else []
        yield "bytes", f"by encoding {'random numbers' if self.varies else 'zeros'}; not counted: {', '.join(left)}"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return {**asdict(self), "total_up": self.total_up, "total_down": self.total_down}


def traffic(config: Config, model: MoLoRAModel, base: str, clients: Sequence[tuple[str, int]] = ()) -> Traffic:
    """How many bytes a run sends.

    Args:
        config: The run; no part of it refuses another.
        model: Base and adapter, with the values that everybody starts from.
        base: Digest of the base weights.
        clients: Names with rows to train on, in their order; without, ones as long as those of a simulation.
    """
    layout = model.layout.where(lambda key: not key.residual)
    planner, numbers = Planner(config, base), range(1, min(2, config.run.rounds) + 1)
    turns = max(len(shares(config, number).ranks) for number in numbers) or 1
    named = [*clients, *((f"client-{n + 1}", 1) for n in range(len(clients), turns))]
    up, varies, largest = [], False, 0
    for number in numbers:
        found = []
        for turn in range(min(turns, config.data.clients)):
            client, rows = named[turn]
            plan = planner.plan(client, number, model.layout, {}, turn)
            sent = expected(plan, layout)
            size, free = _sent(config, model, plan, sent, rows)
            found.append(size)
            varies, largest = varies or free, max(largest, size, 4 * sent.size)
        up.append(tuple(found))
    first, later, whole, free = _fetched(config, model, layout)
    lower = config.federation.lower.build("lower")
    return Traffic(
        asked=asked(config),
        rounds=config.run.rounds,
        up=tuple(up) if len(set(up)) > 1 else (up[0],),
        first=first,
        later=later,
        varies=varies or free,
        patched=lower.patches and bool(layout.experts),
        masked=config.privacy.secure_aggregation,
        largest=max(largest, whole),
    )


def _sent(config: Config, model: MoLoRAModel, plan: ClientPlan, layout: Layout, rows: int) -> tuple[int, bool]:
    """Bytes of what a client sends, and whether they depend on its values."""
    if config.privacy.secure_aggregation:
        numbers = np.zeros(Form(layout, len(figures_of(config))).size, np.uint64)
        return len(
            encode_masked(Masked(plan.run, plan.round, 0, plan.client, plan.base, layout.digest, numbers))
        ), False
    rng = np.random.default_rng(0)  # counts are compressed, and equal ones would take less
    pairs = [(name, e) for name, site in model.sites.items() if site.group for e in model.expert_ids(site)]
    tokens = {pair: float(mass) for pair, mass in zip(pairs, rng.random(len(pairs), np.float32), strict=True)}

    def encode(tree: Tree) -> bytes:
        delta = Delta(plan.run, plan.round, plan.client, plan.base, tree, rows, tokens)
        return encode_delta(delta, plan.codec, {})

    return _size(encode, layout)


def _fetched(config: Config, model: MoLoRAModel, layout: Layout) -> tuple[int, tuple[int, ...], int, bool]:
    """Bytes of what a client fetches first, after each kind of round, and at once; and whether values decide them."""
    every = [scopes(config, number) for number in range(1, min(2, config.run.rounds) + 1)]
    later = [0] * len(every)
    first = largest = 0
    varies, anew = False, config.federation.lower.build("lower").needs_products  # which makes both factors anew
    for part in groups(model.tree(layout)).values():
        sent = len(encode_tree(part, config.wire.down))
        first, largest = first + sent, max(largest, sent, 4 * part.layout.size)
        size, free = _size(_encoder(config.wire.down), part.layout)
        remade = anew and any(key.expert != NO_EXPERT for key in part)
        for at, scope in enumerate(every):
            if remade or any(scope_of(scope, key) == "shared" for key in part):
                later[at] += size
                varies = varies or free
    return first, tuple(dict.fromkeys(later)), largest, varies


def _in_turns(sizes: Sequence[int], times: int) -> int:
    """The sum of so many sizes, which take turns."""
    whole, rest = divmod(times, len(sizes))
    return whole * sum(sizes) + sum(sizes[:rest])


def _size_of(count: int) -> str:
    """Bytes as a run tells them, and smaller ones so that something is left of them."""
    return megabytes(count) if count >= 1e5 else storage(count)


def _ends(sizes: Sequence[int]) -> str:
    """The least and the most of several sizes."""
    return " to ".join(dict.fromkeys(_size_of(size) for size in (min(sizes), max(sizes))))


def _encoder(codec: MethodRef) -> Callable[[Tree], bytes]:
    return lambda tree: encode_tree(tree, codec)


def _size(encode: Callable[[Tree], bytes], layout: Layout) -> tuple[int, bool]:
    """Bytes of an encoded tree: of zeros, or of noise where that makes a difference; and whether it does."""
    zeros = len(encode(Tree(layout)))
    noise = np.random.default_rng(0).standard_normal(layout.size, np.float32) * np.float32(_NOISE)
    random = len(encode(Tree(layout, noise)))
    return random, random != zeros
