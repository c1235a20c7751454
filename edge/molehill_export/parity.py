"""How a finished bundle compares with the model it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.errors import BundleError, ModelError
from molehill.molora.interfaces import RouteRecord
from molehill.molora.model import MoLoRAModel
from molehill.outputs import About, Reading
from molehill.tasks.batches import IGNORE, Example, alike, pad
from molehill_edge import manifest as manifests
from molehill_edge.manifest import LOGITS_FROM
from molehill_export.texts import CALIBRATION
from molehill_protos.v1 import bundle_pb2 as pb

Array = NDArray[Any]
_LONG, _SHORT = 512, 64  # tokens
_TOGETHER = 1024, 1 << 25  # tokens, and logits, of the original at once, with padding
_START = 32  # tokens that cost as much as reading the weights of a base that stays in its files
GOLDEN, SHOWN = 4, 32  # short texts and logits that the manifest keeps
_BEGINNINGS = (128, 112, 96, 80, 64, 48, 32)  # tokens of the longest text, since kernels differ with the length

# Largest logit error and least agreement, by scheme: some times what healthy models show.
FLOORS = {"fp32": (1e-5, 0.99), "int8": (0.1, 0.9), "int4": (0.2, 0.8)}


@dataclass
class Difference:
    """Differences of logits and of routes, added up over texts.

    Attributes:
        reading: How logits are read.
    """

    reading: Reading
    texts: int = 0
    square: float = 0.0
    values: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # n, sum, sum of squares of the original
    same: int = 0
    predictions: int = 0
    routed: int = 0
    routes_same: int = 0

    def add(self, original: Array, other: Array) -> None:
        """Two ``[n, C]``."""
        self.texts += 1
        for a, b in zip(original, other, strict=True):  # one by one, since vocabularies are large
            one, two = a.astype(np.float64), b.astype(np.float64)
            self.square += float(np.square(one - two).sum())
            for i, total in enumerate((one.size, one.sum(), np.square(one).sum())):
                self.values[i] += float(total)
            same = self.reading.alike(a[None], b[None])
            self.same += int(same.sum())
            self.predictions += same.size

    @property
    def error(self) -> float:
        """Mean squared difference over the spread of the original."""
        n, total, squares = self.values
        return self.square / n / max(self.reading.spread(total / n, squares / n), 1e-30)


class Runner:
    """A graph on this machine, without the device runtime around it.

    Args:
        graph: Its file.
        manifest: Of the bundle.
    """

    def __init__(self, graph: Path, manifest: pb.Manifest) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # products are long, and waits few
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._generation = manifest.task.generation if manifests.reading(manifest.task).writes else None
        self._routes = [f"route.{i}" for i in range(len(manifest.routers))]
        self._cuts = LOGITS_FROM in {value.name for value in self._session.get_overridable_initializers()}

    def __call__(self, ids: Sequence[int], begin: int = 0) -> tuple[Array, list[Array]]:
        """Logits of one text, and the weights of every router.

        Returns:
            ``[1, C]``, of tokens ``[T, C]``, or from a position on ``[T - begin, V]``.
        """
        feed: dict[str, Array] = {
            "input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)
        }  # fmt: skip
        if self._generation is not None:
            empty = np.zeros((1, self._generation.heads, 0, self._generation.head_dim), np.float32)
            feed |= {
                f"past_key_values.{i}.{part}": empty
                for i in range(self._generation.layers)
                for part in ("key", "value")
            }
        if begin and self._cuts:
            feed[LOGITS_FROM] = np.array([begin], np.int64)
        logits, *routes = self._session.run(["logits", *self._routes], feed)
        if self._generation is None:
            return logits.reshape(-1, logits.shape[-1]), routes
        return logits[0] if self._cuts else logits[0, begin:], routes


@dataclass(frozen=True)
class Originals:
    """What the model says that a bundle is made from.

    Attributes:
        texts: Token ids of the calibration text.
        answers: For each of them the logits, ``[T, V]``, ``[T, C]`` or ``[1, C]``, and the weights of every router.
        examples: Labelled rows of the run, for the figure of both; only counts of them are kept.
        counts: Of these rows, what the figure is made of (`molehill.outputs.Reading.counts`).
        reading: How logits are read.
    """

    texts: Sequence[Sequence[int]]
    answers: list[tuple[Array, list[Array]]]
    examples: Sequence[Example]
    counts: Array
    reading: Reading


@torch.no_grad()
def originals(
    model: MoLoRAModel, texts: Sequence[Sequence[int]], examples: Sequence[Example], reading: Reading
) -> Originals:
    """Run the original.

    Args:
        model: In float32, with the bundle's default gate and experts.
        texts: Token ids of the calibration text.
        examples: Labelled rows of the run.
        reading: How its logits are read.
    """
    counts = _counts(model, examples, reading) if examples else np.zeros(0)
    return Originals(texts, _answers(model, texts), examples, counts, reading)


def compare(original: Originals, runner: Runner, about: About) -> tuple[pb.Parity, list[pb.Golden]]:
    """Measure a bundle.

    Args:
        original: What it was made from.
        runner: The bundle.
        about: What its numbers are about.

    Returns:
        The figures, and some inputs with what the bundle answered: short ones, and one as long as it takes, up to 128.
    """
    reading = original.reading
    total = Difference(reading)
    longest, short = max(original.texts, key=len), list[_Answered]()
    for ids, (wanted, routes) in zip(original.texts, original.answers, strict=True):
        found, others = runner(ids)
        total.add(wanted, found)
        for a, b in zip(routes, others, strict=True):
            same = a.argmax(-1) == b.argmax(-1)
            total.routed += same.size
            total.routes_same += int(same.sum())
        if len(ids) <= _SHORT and ids is not longest:
            short.append((ids, found[-1].copy()))
    parity = pb.Parity(
        texts=total.texts, logit_error=total.error, agreement=total.same / total.predictions,
        router_agreement=total.routes_same / total.routed if total.routed else 1.0,
    )  # fmt: skip
    if original.examples:
        counts = np.sum([_of_bundle(runner, example, reading) for example in original.examples], 0)
        ours, theirs = (reading.figure_of(each, about) for each in (counts, original.counts))
        parity.rows = len(original.examples)
        if reading.figure:
            parity.figure, parity.figure_original, parity.figure_bundle = reading.figure, theirs, ours
        else:
            parity.accuracy_original, parity.accuracy_bundle = theirs, ours
    beginnings = [longest[:length] for length in _BEGINNINGS if length <= len(longest)][:4] or [longest]
    long = [(ids, runner(ids)[0][-1]) for ids in beginnings]
    return parity, [*_clearest(short, GOLDEN, reading), *_clearest(long, 1, reading)]


_Answered = tuple[Sequence[int], Array]  # token ids, and logits after the last or of the class


def _clearest(answered: Sequence[_Answered], count: int, reading: Reading) -> list[pb.Golden]:
    """Those that are furthest from saying something else: near ties turn where another processor rounds."""
    chosen = sorted(answered, key=lambda each: reading.lead(each[1]), reverse=True)[:count]
    return [pb.Golden(input_ids=ids, logits=logits[:SHOWN], best=int(logits.argmax())) for ids, logits in chosen]


def require(parity: pb.Parity, scheme: str, *, force: bool) -> None:
    """Refuse a bundle that is not what it was made from.

    Raises:
        BundleError: It is below the floor of its scheme, and nobody insists.
    """
    error, agreement = FLOORS[scheme]
    if force or (parity.logit_error <= error and parity.agreement >= agreement):
        return
    raise BundleError(
        f"the {scheme} bundle differs too much from the original: relative logit error {parity.logit_error:.2g} "
        f"(at most {error:g}), same prediction in {parity.agreement:.1%} (at least {agreement:.0%})",
        mend="Take more bits with --quantize, or insist with --force.",
    )


def calibration(tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of the calibration text: sentences, longest first, then all of them as one text.

    Raises:
        ModelError: There are none.
    """
    texts = [*CALIBRATION, " ".join(CALIBRATION)]  # one of them long: some differences show late
    ids = [list(tokenizer(text, truncation=True, max_length=min(max_length, _LONG))["input_ids"]) for text in texts]
    found = [each for each in ids if each]
    if not found:
        raise ModelError("the tokenizer makes no token of any calibration text", mend="Give the base's own tokenizer.")
    return sorted(found, key=lambda each: (len(each) > _SHORT, -len(each), each))


def passes(model: MoLoRAModel, lengths: Sequence[int]) -> list[list[int]]:
    """Which texts go through the original together: of like length, where rows do not see each other.

    Args:
        model: The original.
        lengths: Of the texts, in tokens.

    Returns:
        Indices of the texts of every pass.
    """
    if model.head is not None:
        return [[text] for text in range(len(lengths))]
    base: Any = model.base
    tokens, logits = _TOGETHER
    most = min(tokens, logits // base.config.get_text_config().vocab_size)
    found = []
    for run in alike(lengths, _START, len(lengths)):
        rows = max(1, most // lengths[run[0]])
        found += [run[start : start + rows] for start in range(0, len(run), rows)]
    return found


def decode(model: MoLoRAModel, texts: Sequence[Sequence[int]], **how: Any) -> tuple[Tensor, list[RouteRecord]]:
    """Logits ``[B, T, V]``, ``[B, T, C]`` or ``[B, 1, C]`` of texts, padded on the right, and the routes of the pass.

    Args:
        model: The original.
        texts: Token ids.
        how: Further arguments of the base of a causal LM.
    """
    batch = pad([Example(list(ids), list(ids) if model.head is None else 0) for ids in texts], 0)
    with _recorded(model):
        if model.head is not None:
            states = model.hidden(batch.input_ids, batch.attention_mask)
            said = model.head(model.head.pool(states, batch.attention_mask)).float()
            return said.unsqueeze(1) if model.head.pools else said, model.state.records
        model.state.announce(batch.attention_mask)
        mask = batch.attention_mask.long()
        logits = model.base(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **how).logits
    return logits.float(), model.state.records


@contextmanager
def _recorded(model: MoLoRAModel) -> Iterator[None]:
    model.state.collect = True
    try:
        yield
    finally:
        model.state.collect = False


def _answers(model: MoLoRAModel, texts: Sequence[Sequence[int]]) -> list[tuple[Array, list[Array]]]:
    """Logits and the weights of every router for each text."""
    found: dict[int, tuple[Array, list[Array]]] = {}
    for run in passes(model, [len(ids) for ids in texts]):
        logits, routes = _pass(model, [texts[text] for text in run])
        for row, text in enumerate(run):  # logits are parts of those of the pass, of which little is padding
            tokens = len(texts[text])
            own = logits[row, : 1 if model.head is not None and model.head.pools else tokens]
            found[text] = own, [_of_row(weights, row, tokens) for weights in routes]
    return [found[text] for text in range(len(texts))]


def _pass(model: MoLoRAModel, texts: Sequence[Sequence[int]]) -> tuple[Array, list[Array]]:
    """Logits as of `decode` and the weights of every router, of texts padded on the right."""
    logits, records = decode(model, texts)
    by_site = {record.site.name: record.route.weights.numpy() for record in records}
    return logits.numpy(), [by_site[group.site.name] for group in model.routers.values()]


def _of_row(weights: Array, row: int, tokens: int) -> Array:
    """What a router says of one text: of ``[B|1, T|1, ...]`` the part ``[1, T|1, ...]``."""
    own = weights[row : row + 1] if len(weights) > 1 else weights
    return own[:, :tokens].copy()


def _counts(model: MoLoRAModel, examples: Sequence[Example], reading: Reading) -> Array:
    """What the figure of the original is made of; the head runs where there are labels."""
    found = []
    for run in passes(model, [len(example.input_ids) for example in examples]):
        batch = pad([examples[row] for row in run], 0)
        forward = model(batch.input_ids, batch.attention_mask, batch.labels)
        found.append(reading.counts(forward.scores.float().numpy(), forward.labels.numpy()))
    total: Array = np.sum(found, 0)
    return total


def _of_bundle(runner: Runner, example: Example, reading: Reading) -> Array:
    """What the figure of a bundle is made of, of one row."""
    if not isinstance(example.labels, list):
        return reading.counts(runner(example.input_ids)[0], np.array([example.labels]))
    if reading.by_token:
        labels = np.array(example.labels)
        there = labels != IGNORE
        return reading.counts(runner(example.input_ids)[0][there], labels[there])
    after = np.array(example.labels[1:])  # what a token is followed by
    positions = np.flatnonzero(after != IGNORE)
    logits, _ = runner(example.input_ids, int(positions[0]))
    return reading.counts(logits[positions - positions[0]], after[positions])
