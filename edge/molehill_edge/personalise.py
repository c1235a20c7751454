"""Fitting ``router_bias`` and ``expert_mask`` to a few texts of the owner, with forward passes only.

Nothing leaves the device, and no weight changes: one number per expert says how gladly it is chosen, by all routers
alike at first, then by each router when there are texts enough. A device has no gradients, so the numbers are searched
one at a time; moving all of them at once at random (SPSA) gained a sixth of that with as many readings. Part of the
texts is held out: only they say whether the result is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from molehill.decoding.interfaces import log_softmax
from molehill.errors import BundleError
from molehill.rowfiles.pairs import Text
from molehill_edge import gates
from molehill_edge import manifest as manifests
from molehill_edge.gates import Gate
from molehill_protos.v1.bundle_pb2 import Manifest

Array = np.ndarray[Any, Any]

FEWEST = 4  # texts
_HELD_OUT = 0.3
_SHARED, _OWN = 1.0, 0.5  # how far a bias is expected to go (standard deviation of a Gaussian around 0)
_ENOUGH = 16  # texts to fit, from which on every router gets a bias of its own
_STEP, _SMALLEST_STEP = 1.0, 0.2
_GAIN = 1e-4  # of the loss; less is rounding
# Without labels, surer answers are only a sign of better ones: gains of 3% lowered accuracy by 0.7 points on reviews.
_PROXY_MARGIN = 0.1


class Reader(Protocol):
    """What reads texts with a gate; `View` does."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""

    @property
    def gate(self) -> Gate:
        """The gate in use."""

    def gate_tensors(self) -> dict[str, Array]:
        """The tensors of the gate in use, with the rows of experts that were added."""

    def with_gate(self, gate: Gate) -> Reader:
        """The same with another gate."""

    def encode(self, text: Text, *, raw: bool = False) -> list[int]:
        """Ids of a text."""

    def encode_all(self, texts: Sequence[Text], *, truncate: bool = False) -> list[list[int]]:
        """Ids of texts that something is said of."""

    def logits(self, encoded: Sequence[Sequence[int]]) -> Array:
        """Logits of texts of a bundle that does not write, ``[texts, C]``."""

    def forward(self, ids: Array, mask: Array, outputs: list[str]) -> list[Array]:
        """Outputs of the graph for tokens ``[batch, sequence]`` that nothing comes before."""


@dataclass(frozen=True)
class Score:
    """How a gate does on some texts.

    Attributes:
        loss: Minus the log likelihood of labels, or of a token for a causal LM; for classes without labels the entropy
            of a text less the entropy of their mean.
        accuracy: Fraction with the right class, or of labels that are rightly there or not; None without labels, and of
            numbers.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Outcome:
    """What personalising came to.

    Attributes:
        gate: The personal gate, or the one of before when that is better on the texts held out.
        kept: Whether it is a new one: the loss on the texts held out must not be higher and the accuracy not lower;
            without labels a classifier's loss must be a tenth lower, since it says less.
        before: Of the gate of before, on the texts held out.
        after: Of the fitted gate, on the texts held out, whether kept or not.
        fitted: Texts that it was fitted to.
        held_out: Texts that were held out.
        evaluations: How many times the texts were read.
        dropped: Experts that the fitted gate never chooses.
    """

    gate: Gate
    kept: bool
    before: Score
    after: Score
    fitted: int
    held_out: int
    evaluations: int
    dropped: tuple[str, ...]


def personalise(
    view: Reader, texts: Sequence[Text], labels: Sequence[Any] | None = None, *, seed: int = 0, budget: int = 80
) -> Outcome:
    """Fit a gate's bias and mask to texts.

    Args:
        view: The bundle with the gate to begin with.
        texts: Of the owner; what is too long loses its end.
        labels: One for each, of the bundle's kind: a class, a list of labels, or a number. For classes the search goes
            without when None.
        seed: Equal seeds give equal results.
        budget: How many times the texts may be read.

    Raises:
        BundleError: The texts are too few, labels are missing, or the bundle has no router.
        DataError: A label is none of the bundle's kind.
    """
    manifest = view.manifest
    if not manifest.routers:
        raise BundleError("the bundle has no router to fit", where=manifest.id)
    if not manifests.reading(manifest.task).fits:
        what = f"no device can fit a gate of a bundle for {manifest.task.kind}"
        raise BundleError(what, where=manifest.id, mend="Export gates that a run has fitted: molehill export --gate.")
    targets = _targets(manifest, texts, labels)
    rng = np.random.default_rng(seed)
    fit, held = _split(texts, rng)
    losses = [_Loss(view, [texts[i] for i in part], None if targets is None else targets[part]) for part in (fit, held)]
    start = replace(view.gate, tensors=view.gate_tensors())
    search = _Search(view, start, losses[0], rng, budget)
    search.run()
    found = search.best
    before, after = losses[1].score(start), losses[1].score(found)
    proxy = targets is None and not manifests.reading(manifest.task).writes
    enough = before.loss - (_PROXY_MARGIN * abs(before.loss) if proxy else 0)
    better = after.loss <= enough and (after.accuracy or 0) >= (before.accuracy or 0)
    kept = better and found is not start
    dropped = start.mask & ~found.mask & gates.usable(manifest)
    slots = np.array(gates.slots(manifest))
    return Outcome(
        replace(found, name=f"{start.name}, personalised") if kept else view.gate,
        kept, before, after, len(fit), len(held), search.used,
        tuple(sorted({manifest.slots[slot].id for slot in slots[dropped]})),
    )  # fmt: skip


class _Loss:
    """The loss of a gate on some texts."""

    def __init__(self, view: Reader, texts: Sequence[Text], targets: Array | None) -> None:
        self._view = view
        task = view.manifest.task
        self.texts = len(texts)
        self._targets, self._reading = targets, manifests.reading(task)
        if not self._reading.writes:
            self._encoded = view.encode_all(texts, truncate=True)
        else:
            encoded = [view.encode(text, raw=True)[: task.max_length] for text in texts]
            self._encoded = [ids for ids in encoded if len(ids) > 1]
            if not self._encoded:
                raise BundleError("no text has more than one token", mend="Give longer texts.")

    def score(self, gate: Gate) -> Score:
        view = self._view.with_gate(gate)
        if self._reading.writes:
            return Score(self._likelihood(view), None)
        logits = view.logits(self._encoded)
        if self._targets is not None:
            right = self._reading.right(logits, self._targets)
            loss = float(self._reading.losses(logits, self._targets).mean())
            return Score(loss, None if right is None else float(right.mean()))
        probabilities = np.maximum(np.exp(log_softmax(logits)), 1e-12)
        return Score(float(_entropy(probabilities).mean() - _entropy(probabilities.mean(0))), None)

    def _likelihood(self, view: Reader) -> float:
        total, count = 0.0, 0
        for ids in self._encoded:
            row = np.array([ids], np.int64)
            logits = view.forward(row, np.ones_like(row), ["logits"])[0][0, :-1]
            shifted = logits - logits.max(-1, keepdims=True)
            chosen = shifted[np.arange(len(ids) - 1), row[0, 1:]]
            total += float((np.log(np.exp(shifted).sum(-1)) - chosen).sum())
            count += len(ids) - 1
        return total / count


class _Search:
    """One search, from a gate to a better one."""

    def __init__(self, view: Reader, start: Gate, loss: _Loss, rng: np.random.Generator, budget: int) -> None:
        self.best = start
        self.used = 0
        self._start, self._loss, self._rng, self._budget = start, loss, rng, budget
        manifest = view.manifest
        present = gates.usable(manifest) & start.mask
        self._slots = np.array(gates.slots(manifest))
        self._begins = gates.starts(manifest)
        self._known = np.array(sorted(set(self._slots[present].tolist())))
        self._value = self._measure(start)

    def run(self) -> None:
        """Shared biases, then experts left out, then biases of every router."""
        routers = len(self._begins) - 1
        own = routers > 1 and self._loss.texts >= _ENOUGH
        shared = np.stack([self._slots == slot for slot in self._known]).astype(np.float32)
        self._coordinates(shared, _SHARED, self._budget * (5 if own else 7) // 10)
        self._drop(self._budget * (7 if own else 10) // 10)
        if own:
            whose = np.repeat(np.arange(routers), np.diff(self._begins))
            each = [(self._slots == slot) & (whose == router) for router in range(routers) for slot in self._known]
            self._coordinates(np.stack([e for e in each if e.any()]).astype(np.float32), _OWN, self._budget)

    def _measure(self, gate: Gate) -> float:
        self.used += 1
        return self._loss.score(gate).loss

    def _coordinates(self, directions: Array, spread: float, until: int) -> None:
        """Move along one direction at a time, and pull all of them to 0."""
        origin = self.best
        point = np.zeros(len(directions))
        moves = np.ones(len(directions))
        step = _STEP * spread

        def at(where: Array) -> Gate:
            return replace(origin, bias=(origin.bias + where @ directions).astype(np.float32))

        value, moved = self._value, True  # with what the distance costs
        while self.used < until and (moved or step > _SMALLEST_STEP * spread):
            step, moved = (step, False) if moved else (step / 2, False)
            for i in self._rng.permutation(len(directions)):
                for _ in range(2):
                    if self.used >= until:
                        break
                    there = point.copy()
                    there[i] += moves[i] * step
                    loss = self._measure(at(there))
                    new = loss + float((there**2).sum()) / (2 * spread**2 * self._loss.texts)
                    if new < value - _GAIN:
                        point, value, moved = there, new, True
                        self.best, self._value = at(point), loss
                        break
                    moves[i] = -moves[i]

    def _drop(self, until: int) -> None:
        """Leave out experts that only harm."""
        price = 1 / (2 * self._loss.texts)  # as much as a bias of one standard deviation
        for slot in self._rng.permutation(self._known):
            mask = self.best.mask & (self._slots != slot)
            left = mask & np.isin(self._slots, self._known)
            if self.used >= until or not all(
                left[b:e].any() for b, e in zip(self._begins[:-1], self._begins[1:], strict=True)
            ):
                continue
            gate = replace(self.best, mask=mask)
            loss = self._measure(gate)
            if loss < self._value - price - _GAIN:
                self.best, self._value = gate, loss


def _split(texts: Sequence[Text], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Texts to fit and texts to hold out; equal texts are on one side."""
    groups: dict[Text, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text, []).append(i)
    if len(groups) < FEWEST:
        raise BundleError(f"{len(groups)} different texts, where at least {FEWEST} are needed", mend="Give more texts.")
    parts = list(groups.values())
    order = rng.permutation(len(parts))
    count = max(2, round(_HELD_OUT * len(parts)))
    held, fit = (sorted(i for at in part for i in parts[at]) for part in (order[:count], order[count:]))
    return fit, held


def _targets(manifest: Manifest, texts: Sequence[Text], labels: Sequence[Any] | None) -> Array | None:
    """What the bundle should say of every text, ``[texts]`` or ``[texts, C]``; None where nobody says."""
    reading, about = manifests.reading(manifest.task), manifests.about(manifest.task)
    if labels is None:
        if not (reading.several or reading.writes):
            what = "without labels there is nothing to fit to: only of classes it says something how sure the bundle is"
            raise BundleError(what, where=manifest.id, mend=f"Give every row its {reading.column!r}.")
        return None
    if reading.writes:
        raise BundleError("the bundle generates text: it takes texts without labels")
    if len(labels) != len(texts):
        raise BundleError(f"{len(texts)} texts but {len(labels)} labels")
    return np.array([reading.target(label, about, f"label {n + 1}") for n, label in enumerate(labels)])


def _entropy(probabilities: Array) -> Array:
    entropy: Array = -(probabilities * np.log(probabilities)).sum(-1)
    return entropy
