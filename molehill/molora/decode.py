"""Passes of a MoLoRA model on a host: one text at a time with a cache for every lane, or many rows at once."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from molehill.decoding.interfaces import OWN, Array, Passes, Setting
from molehill.decoding.sampling import Sampler
from molehill.decoding.settings import only_of
from molehill.decoding.stream import Asked, Reader, room
from molehill.errors import AnswerError
from molehill.molora.interfaces import Overrides
from molehill.molora.model import MoLoRAModel

_TURNS: WeakKeyDictionary[MoLoRAModel, threading.RLock] = WeakKeyDictionary()  # of models, each for one pass at a time
_TURN = threading.Lock()


def require_causal(model: MoLoRAModel) -> None:
    """Refuse routers that look at tokens which are not there yet.

    Raises:
        AnswerError: A selector is not causal.
    """
    for group in model.routers.values():
        selector = group.router.selector
        if not selector.causal:
            raise AnswerError(
                f"selector {type(selector).__name__} looks at later tokens, which do not exist while a text is written",
                where="molora.selector", mend="Train with another selector.",
            )  # fmt: skip


def routed(model: MoLoRAModel) -> list[tuple[str, ...]]:
    """Ids of the experts of every router, in the order of its logits."""
    found = []
    for group in model.routers.values():
        site = model.site_of(group)
        found.append(model.expert_ids(site)[site.shared :])
    return found


def _sizes(model: MoLoRAModel) -> list[int]:
    """How many experts every router chooses among, in the order of its logits."""
    return [len(router) for router in routed(model)]


def only(model: MoLoRAModel, experts: Iterable[str]) -> Setting:
    """The setting in which none but some experts may be chosen.

    Raises:
        AnswerError: There is no such expert, or a router would be left without.
    """
    return only_of(routed(model), experts)


@contextmanager
def applied(model: MoLoRAModel, settings: Sequence[Setting]) -> Iterator[None]:
    """Let routers choose as settings say: one for all rows of a pass, or one for each, all with or without experts.

    Other threads wait for their turn with the model meanwhile.

    Raises:
        AnswerError: A setting does not fit the model.
    """
    with _TURN:
        turn = _TURNS.setdefault(model, threading.RLock())
    with turn, _applied(model, settings):
        yield


@contextmanager
def _applied(model: MoLoRAModel, settings: Sequence[Setting]) -> Iterator[None]:
    sizes = _sizes(model)
    for setting in settings:
        for values in (setting.bias, setting.mask, setting.weights):
            if values is not None and len(values) != sum(sizes):
                raise AnswerError(f"a setting has {len(values)} numbers, the routers have {sum(sizes)}")
        if setting.ranks is not None:
            _require_place(setting.ranks, min(sizes, default=0))
    before = [group.overrides for group in model.routers.values()]
    enabled = model.state.enabled
    bias = _stacked([setting.bias for setting in settings], 0.0, sizes, torch.float32)
    mask = _stacked([setting.mask for setting in settings], True, sizes, torch.bool)  # noqa: FBT003  (a fill value)
    alike = {(setting.base, setting.ranks, setting.weights) for setting in settings}
    if len(alike) > 1:
        raise AnswerError("rows of one pass have experts or none, and the same places and weights")
    ((_, ranks, weights),) = alike
    fixed = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    try:
        at = 0
        for group, size in zip(model.routers.values(), sizes, strict=True):
            mine = slice(at, at + size)
            kept = group.overrides
            may = _both(kept.expert_mask, None if mask is None else mask[..., mine].to(group.costs.device))
            if may is not None and not bool(may.any(-1).all()):
                raise AnswerError("a router would be left without experts", mend="Choose from more experts.")
            if may is not None and ranks is not None:
                _require_place(ranks, int(may.sum(-1).min()))
            group.overrides = Overrides(
                bias=_sum(kept.bias, None if bias is None else bias[..., mine].to(group.costs.device)),
                expert_mask=may,
                ranks=kept.ranks if ranks is None else ranks,
                weights=kept.weights if fixed is None else fixed[mine].to(group.costs.device),
            )
            at += size
        model.state.enabled = enabled and not settings[0].base
        yield
    finally:
        model.state.enabled = enabled
        for group, kept in zip(model.routers.values(), before, strict=True):
            group.overrides = kept


def _require_place(ranks: tuple[int, int], experts: int) -> None:
    """Refuse places that a router with so many experts to choose from does not have."""
    if not 0 <= ranks[0] < min(ranks[1], experts):
        mend = "Choose an earlier place, or from more experts." if experts else "It has no routers."
        raise AnswerError(f"no router has an expert at place {ranks[0] + 1}", mend=mend)


def _stacked(
    rows: Sequence[Sequence[Any] | None], fill: Any, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """``[S]`` where all rows agree, ``[rows, 1, S]`` where they do not, None where nobody says anything."""
    if all(row is None for row in rows):
        return None
    full = [tuple([fill] * sum(sizes)) if row is None else tuple(row) for row in rows]
    if len(set(full)) == 1:
        return torch.tensor(full[0], dtype=dtype)
    return torch.tensor(full, dtype=dtype).unsqueeze(1)


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two


def _both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one & two


@dataclass
class _Lane:
    """What a cache is of.

    Attributes:
        setting: With which it was made.
        ids: Tokens that are in it.
        cache: It.
    """

    setting: Setting = OWN
    ids: list[int] = field(default_factory=list)
    cache: Any = None


class TorchPasses:
    """Passes of a MoLoRA model; implements `molehill.decoding.interfaces.Passes` and what some strategies need beside.

    Where routers go by what the base alone makes of a prompt, the tokens of a pass are one as a whole; of an answer to
    a prompt ask what `about` gives.

    Args:
        model: In eval mode, with the gate that is to be used.
        within: Holds in all passes, whatever a setting says.
        others: Models that read the same tokens, see `molehill.decoding.interfaces.Aided`.

    Raises:
        AnswerError: It is a causal LM with a router that looks at later tokens.
    """

    def __init__(
        self, model: MoLoRAModel, *, within: Setting = OWN, others: Mapping[str, Passes] | None = None
    ) -> None:
        self._model, self._within, self._open = model, within, True
        self._prompt: list[int] | None = None  # with which texts begin, where that counts
        self._read: Tensor | None = None  # what the base makes of it
        self._of: TorchPasses | None = None  # of which these are a part
        self.others = dict(others or {})
        self._lanes: dict[str, _Lane] = {}
        routers = routed(model)
        self.experts = tuple(dict.fromkeys(each for router in routers for each in router))
        self.size = sum(map(len, routers))
        self.writes = model.head is None
        settings = _settings(model)
        self.answers = int(settings.vocab_size) if model.head is None else int(model.head.weight.shape[0])
        if self.writes:
            require_causal(model)

    def only(self, experts: Iterable[str]) -> Setting:
        """See `Passes.only`."""
        return only(self._model, experts)

    def about(self, prompt: Sequence[int]) -> TorchPasses:
        """Passes for a prompt and answers to it: to routers an answer is what its prompt is, whatever else was asked.

        Where no router goes by prompts they are these, with all caches; else their own, and closed with these.

        Args:
            prompt: Ids, at least one.
        """
        if not self._model.state.reads_base:
            return self
        found = TorchPasses(self._model, within=self._within, others=self.others)
        found._prompt, found._of = list(prompt), self
        return found

    def close(self) -> None:
        """Refuse all that is asked from now on: the model gets another gate."""
        self._open = False
        self.forget()

    def require_open(self) -> None:
        """Refuse to ask what is closed.

        Raises:
            AnswerError: It is.
        """
        if self._of is not None:
            self._of.require_open()
        if not self._open:
            mend = "Use what took its place, or load it again."
            raise AnswerError("the model was closed, or goes on with another gate", mend=mend)

    def forget(self) -> None:
        """Let go of all caches: after another gate, say."""
        self._lanes.clear()

    def kept(self, ids: Sequence[int], lane: str = "") -> int:
        """How many of the first tokens the cache of a lane has."""
        return _common(self._lanes[lane].ids, ids[:-1]) if lane in self._lanes and self._goes_on(ids) else 0

    def _goes_on(self, ids: Sequence[int]) -> bool:
        """Whether routers may find in a cache what they would find without."""
        prompt = self._prompt
        return not self._model.state.reads_base or (prompt is not None and list(ids[: len(prompt)]) == prompt)

    def _known(self, ids: Sequence[int], setting: Setting) -> Tensor | None:
        """What the base makes of the prompt of a text; None where the text is one as a whole, or nobody asks."""
        if self._prompt is None or setting.base or not self._goes_on(ids):
            return None
        if self._read is None:
            self._read = self._model.state.read(self._model.base, (), {"input_ids": self._row(self._prompt)}, None)
        return self._read

    @torch.no_grad()
    def logits(self, ids: Sequence[int], setting: Setting = OWN, lane: str = "") -> Array:
        """See `Passes.logits`."""
        with self._as(setting):
            if not self.writes:
                return self._classes(ids)
            known = self._lanes.get(lane)
            whole = not setting.base and not self._goes_on(ids)  # what is in a cache has another route
            if known is None or known.setting != setting or whole:
                known = self._lanes[lane] = _Lane(setting)
            self._cut(known, _common(known.ids, ids[:-1]))
            fresh = list(ids[len(known.ids) :])
            if known.cache is None:
                known.cache = DynamicCache()
            extra = {"logits_to_keep": 1} if _keeps(self._model.base) else {}
            try:
                with self._model.state.about(self._known(ids, setting)):
                    out = self._model.base(
                        input_ids=self._row(fresh), past_key_values=known.cache, use_cache=True, **extra
                    )
            except BaseException:
                del self._lanes[lane]  # what is in the cache is not known
                raise
            known.ids = list(ids)
            if whole:
                del self._lanes[lane]
            found: Array = out.logits[0, -1].float().cpu().numpy()
            return found

    @torch.no_grad()
    def losses(self, ids: Sequence[int], setting: Setting = OWN) -> Array:
        """See `Passes.losses`."""
        with self._as(setting):
            found: Array = self._losses(ids, setting).cpu().numpy()
        return found

    def slope(self, ids: Sequence[int], setting: Setting) -> Array:
        """See `Gradients.slope`."""
        model = self._model
        added = [torch.zeros(size, device=model.flat.device, requires_grad=True) for size in _sizes(model)]
        with self._as(setting), torch.enable_grad():
            for group, part in zip(model.routers.values(), added, strict=True):
                group.overrides = replace(group.overrides, bias=_sum(group.overrides.bias, part))
            loss = self._losses(ids, setting).mean()
            if not loss.requires_grad:  # no router has a say
                return np.zeros(self.size, np.float32)
            slopes = torch.autograd.grad(loss, added, allow_unused=True, materialize_grads=True)
        found: Array = torch.cat(slopes).cpu().numpy()
        return found

    @torch.no_grad()
    def condition(self, ids: Sequence[int]) -> Array:
        """See `Conditions.condition`."""
        with self._turn(OWN):
            found = self._model.state.read(self._model.base, (), {"input_ids": self._row(ids)}, None)
        return found[0].cpu().numpy()

    def _losses(self, ids: Sequence[int], setting: Setting) -> Tensor:
        if not self.writes:
            raise AnswerError("a classifier gives tokens no probability", mend="Use another strategy or picker.")
        if len(ids) < 2:
            return torch.zeros(0)
        with self._model.state.about(self._known(ids, setting)):
            logits = self._model.base(input_ids=self._row(ids), use_cache=False).logits[0, :-1].float()
        taken = torch.tensor(list(ids[1:]), device=logits.device).unsqueeze(-1)
        found: Tensor = -logits.log_softmax(-1).gather(-1, taken)[:, 0]
        return found

    def likeness(self) -> Array:
        """See `Likeness.likeness`."""
        found = np.zeros((len(self.experts), len(self.experts)))
        tensors: dict[tuple[str, str], dict[str, Array]] = {}
        for key, value in self._model.tree(lambda key: key.expert in self.experts).items():
            tensors.setdefault((key.site, key.role), {})[key.expert] = value
        for (site, role), values in tensors.items():
            if len({value.shape for value in values.values()}) > 1:
                raise AnswerError(f"experts differ in size at {site} ({role})", mend="Ask for one expert.")
            places = [self.experts.index(name) for name in values]
            rows = np.stack([value.ravel() for value in values.values()]).astype(np.float64)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-8)
            found[np.ix_(places, places)] += abs(rows @ rows.T)
        return found

    def _classes(self, ids: Sequence[int]) -> Array:
        model, row = self._model, self._row(ids)
        assert model.head is not None
        mask = torch.ones_like(row, dtype=torch.bool)
        found: Array = model.head(model.head.pool(model.hidden(row, mask), mask))[0].float().cpu().numpy()
        return found

    @contextmanager
    def _as(self, setting: Setting) -> Iterator[None]:
        with self._turn(self._within), applied(self._model, [setting]):
            yield

    @contextmanager
    def _turn(self, setting: Setting) -> Iterator[None]:
        with applied(self._model, [setting]):
            self.require_open()
            yield

    def _cut(self, lane: _Lane, length: int) -> None:
        """Forget all tokens of a lane after the first so many."""
        if length == len(lane.ids):
            return
        whole = lane.cache is not None and all(not getattr(layer, "is_sliding", False) for layer in lane.cache.layers)
        if whole:
            lane.cache.crop(length - len(lane.ids))
            lane.ids = lane.ids[:length]
        else:  # what slid out of the window is gone
            lane.cache, lane.ids = None, []

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._model.flat.device)


@dataclass(frozen=True)
class Written:
    """Tokens of one answer.

    Attributes:
        tokens: Without the one that ended it.
        end: The one that ended it; None where it is as long as it may be.
    """

    tokens: list[int]
    end: int | None


@torch.no_grad()
def write(
    model: MoLoRAModel, prompts: Sequence[Sequence[int]], reader: Reader, asked: Asked,
    settings: Sequence[Setting] | None = None, at_once: int = 8,
) -> Iterator[Written]:  # fmt: skip
    """Answer many prompts, those of like length in one pass.

    Rows of one pass may have settings of their own, so that one batch asks different experts; those without any
    expert have passes of their own.

    Args:
        model: A causal LM in eval mode.
        prompts: Ids of each.
        reader: Of its tokens.
        asked: How to answer; stop strings are left to who shows the text. Of row n it is `Asked.numbered`.
        settings: One for each prompt; the model's own for all when None.
        at_once: Rows of one pass.

    Yields:
        The answers in the order of the prompts.

    Raises:
        AnswerError: A router looks at later tokens, or a prompt does not fit.
    """
    require_causal(model)
    said = [OWN] * len(prompts) if settings is None else list(settings)
    most = [room(len(ids), asked.max_new_tokens, reader.longest) for ids in prompts]
    done: dict[int, Written] = {}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        groups.setdefault((said[i].base, said[i].ranks, said[i].weights), []).append(i)
    for rows in groups.values():
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            samplers = [Sampler(asked.numbered(i).sampling) for i in part]
            with applied(model, [said[i] for i in part]):
                found = _written(
                    model, [list(prompts[i]) for i in part], [most[i] for i in part], samplers, reader.ends
                )
            done |= dict(zip(part, found, strict=True))
    yield from (done[i] for i in range(len(prompts)))


def _written(
    model: MoLoRAModel, prompts: list[list[int]], most: list[int], samplers: list[Sampler], ends: frozenset[int]
) -> list[Written]:
    """Tokens of answers to the prompts of one pass, which are padded on the left."""
    device, width = model.flat.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    placed, keeps = _takes(model.base, "position_ids"), _keeps(model.base)
    cache = DynamicCache()
    found: list[list[int]] = [[] for _ in prompts]
    open_, ends_by = set(range(len(prompts))), dict[int, int]()
    known: Tensor | None = None  # what the base makes of the prompts, where routers read it
    while True:
        extra: dict[str, Any] = {"position_ids": positions} if placed else {}
        if keeps:
            extra["logits_to_keep"] = 1
        with model.state.about(known):
            out = model.base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        known = model.state.base
        logits = out.logits[:, -1].float().cpu().numpy()
        step = [0] * len(prompts)
        for row in sorted(open_):
            token = samplers[row](logits[row])
            step[row] = token
            if token in ends:
                open_.discard(row)
                ends_by[row] = token
                continue
            found[row].append(token)
            if len(found[row]) == most[row]:
                open_.discard(row)
        if not open_:
            return [Written(tokens, ends_by.get(row)) for row, tokens in enumerate(found)]
        ids = torch.tensor(step, device=device).unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        positions = positions[:, -1:] + 1


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _settings(model: MoLoRAModel) -> Any:
    base: Any = model.base
    return base.config.get_text_config()


def _keeps(base: Any) -> bool:
    return _takes(base, "logits_to_keep")


def _takes(base: Any, name: str) -> bool:
    return name in inspect.signature(base.forward).parameters
