"""What strategies ask of a bundle: passes of its graph, with routers that choose as a setting says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molehill.decoding.interfaces import OWN, Setting, Strategy
from molehill.decoding.settings import only_of
from molehill.decoding.stream import Answer, Asked, Reader, Stream
from molehill.errors import AnswerError
from molehill_edge import manifest as manifests
from molehill_edge.engine import Binding, Bound, Engine
from molehill_edge.gates import BIAS, MASK, PLACES
from molehill_edge.generate import Cache, Inputs, common
from molehill_edge.session import value

Array = np.ndarray[Any, Any]

_KNOWN = {"bias", "mask", "ranks", "base"}  # of a setting


@dataclass
class _Lane:
    """A setting, the gate that it was put into, and what came out."""

    setting: Setting
    cache: Cache | None
    gate: Bound | None = None
    inputs: Inputs | None = None
    arrays: tuple[Array, ...] = ()  # kept: the inputs only point at them


class EdgePasses:
    """Passes of a bundle; implements `molehill.decoding.interfaces.Passes`.

    Numbers of a setting are for the experts that are there: empty slots have none.

    Args:
        engine: Of the bundle.
        bound: The gate in use; what was computed with another one, or with other experts, does not count.
        after: Passes of the same bundle whose caches go on here, and which nobody uses any more.
    """

    def __init__(self, engine: Engine, bound: Callable[[], Binding], after: EdgePasses | None = None) -> None:
        self._engine, self._bound = engine, bound
        self._lanes: dict[str, _Lane] = {} if after is None else after._lanes  # noqa: SLF001  (of this class)
        self._whole: _Lane | None = None  # for texts that are read at once

    @property
    def experts(self) -> tuple[str, ...]:
        """See `Passes.experts`."""
        return tuple(dict.fromkeys(each for router in self._routers() for each in router))

    @property
    def size(self) -> int:
        """See `Passes.size`."""
        return int(self._engine.numbers.usable.sum())

    @property
    def writes(self) -> bool:
        """See `Passes.writes`."""
        return self._engine.prompts is not None

    @property
    def answers(self) -> int:
        """See `Passes.answers`."""
        return manifests.outputs(self._engine.manifest.task)

    @property
    def by_places(self) -> bool:
        """Whether the graph can choose experts by their places."""
        return PLACES in self._engine.session.overridable

    def only(self, experts: Iterable[str]) -> Setting:
        """See `Passes.only`."""
        return only_of(self._routers(), experts)

    def kept(self, ids: Sequence[int], lane: str = "") -> int:
        """How many of the first tokens a lane need not read again."""
        known = self._lanes.get(lane)
        if known is None or known.cache is None or known.cache.gate is not known.inputs:
            return 0
        return common(known.cache.tokens, ids[:-1]) if known.gate is self._bound().now() else 0

    def most_kept(self, ids: Sequence[int]) -> int:
        """How many of the first tokens the lane need not read again that has most of them."""
        return max((self.kept(ids, lane) for lane in self._lanes), default=0)

    def logits(self, ids: Sequence[int], setting: Setting = OWN, lane: str = "") -> Array:
        """See `Passes.logits`.

        Raises:
            AnswerError: The bundle cannot do this setting.
            BundleError: The tokens are too many, or the graph cannot be computed.
        """
        known = self._lanes.get(lane)
        if known is None:
            known = self._lanes[lane] = self._lane(setting)
        elif known.setting != setting:
            known.setting, known.gate = setting, None
        if known.cache is not None:
            return known.cache.read(ids, lambda: self._inputs(known))
        row = np.array([ids], np.int64)
        mask = np.ones_like(row)
        with self._engine.session.use() as graph:
            feeds = {**self._inputs(known), "input_ids": value(row), "attention_mask": value(mask)}
            (found,) = graph.run_with_ort_values(["logits"], feeds)
        classes: Array = found.numpy()[0]
        return classes

    def losses(self, ids: Sequence[int], setting: Setting = OWN) -> Array:
        """See `Passes.losses`.

        Raises:
            AnswerError: The bundle classifies, or cannot do this setting.
            BundleError: The tokens are too many, or the graph cannot be computed.
        """
        if not self.writes:
            raise AnswerError("a classifier gives tokens no probability", mend="Use another strategy or picker.")
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        if self._whole is None:
            self._whole = self._lane(setting)
        lane = self._whole
        if lane.setting != setting:
            lane.setting, lane.gate = setting, None
        assert lane.cache is not None
        return lane.cache.losses(ids, lambda: self._inputs(lane))

    def answering(
        self, strategy: Strategy | None, ids: Sequence[int], read: Reader, asked: Asked,
        done: Callable[[Answer], None] = lambda _: None,
    ) -> Stream:  # fmt: skip
        """An answer.

        Args:
            strategy: One for this bundle; its own logits when None.
            ids: The prompt.
            read: Of the bundle.
            asked: How to answer.
            done: Called once, at the end or when the stream is closed before.

        Raises:
            AnswerError: Prompt and answer are too long, or the strategy cannot be done with this bundle.
        """
        kept = self.kept(ids)
        scores = self.logits if strategy is None else strategy.begin(self, ids)
        return Stream(scores, ids, read, asked, fed=len(ids) - kept, done=done)

    def _routers(self) -> list[list[str]]:
        """Ids of the experts of every router, without empty slots."""
        manifest = self._engine.manifest
        named = [[manifest.slots[slot].id for slot in router.slots] for router in manifest.routers]
        return [[each for each in router if each] for router in named]

    def _lane(self, setting: Setting) -> _Lane:
        return _Lane(setting, Cache(self._engine.session, self._engine.manifest.task) if self.writes else None)

    def _inputs(self, lane: _Lane) -> Inputs:
        """The gate in use as the lane's setting has it: the same object as long as nothing changes."""
        gate = self._bound().now()
        if lane.gate is not gate or lane.inputs is None:
            changed = self._changed(gate, lane.setting)
            lane.gate, lane.arrays = gate, tuple(changed.values())
            lane.inputs = {**gate.inputs, **{name: value(array) for name, array in changed.items()}}
        return lane.inputs

    def _changed(self, gate: Bound, setting: Setting) -> dict[str, Array]:
        """What a setting changes in the inputs of a gate."""
        if setting == OWN:
            return {}
        self._require_known(setting)
        numbers = self._engine.numbers
        found: dict[str, Array] = {}
        if setting.bias is not None:
            found[BIAS] = gate.arrays[BIAS].copy()
            found[BIAS][numbers.usable] += np.array(setting.bias, np.float32)
        if setting.mask is not None:
            found[MASK] = gate.arrays[MASK].copy()
            found[MASK][numbers.usable] &= np.array(setting.mask, bool)
        left = np.add.reduceat(found.get(MASK, gate.arrays[MASK]).astype(np.intp), numbers.begins)
        if not left.all():
            raise AnswerError("a router is left without an expert", mend="Ask another gate, or more experts.")
        if setting.ranks is not None:
            first, stop = setting.ranks
            if not 0 <= first < min(stop, left.min()):
                mend = "Choose an earlier place, or more experts."
                raise AnswerError(f"no router has an expert at place {first + 1}", mend=mend)
            found[PLACES] = np.array(setting.ranks, np.int64)
        return found

    def _require_known(self, setting: Setting) -> None:
        """Refuse what a graph cannot do."""
        where, ask = self._engine.manifest.id, "Ask the run: molehill generate."
        if setting.base:
            what = "a bundle has no pass of its base alone: experts are part of its graph"
            raise AnswerError(what, where=where, mend=ask)
        for each in dataclasses.fields(setting):
            if each.name not in _KNOWN and getattr(setting, each.name) != each.default:
                raise AnswerError(f"a bundle's graph takes no {each.name} of experts", where=where, mend=ask)
        for values in (setting.bias, setting.mask):
            if values is not None and len(values) != self.size:
                raise AnswerError(f"a setting has {len(values)} numbers, the routers have {self.size}", where=where)
        if not self.size:
            raise AnswerError("the bundle has no routers", where=where, mend="Use another strategy.")
        if setting.ranks is not None and not self.by_places:
            what = "the graph of this bundle cannot choose experts by their places"
            raise AnswerError(what, where=where, mend="Export it with --router-ranks.")
