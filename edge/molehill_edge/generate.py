"""Answers of a causal LM in a bundle: the cache of keys and values, and what its tokens are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from molehill.decoding.interfaces import log_softmax
from molehill.decoding.stream import Reader
from molehill.errors import BundleError
from molehill_edge import tokens
from molehill_edge.manifest import LOGITS_FROM
from molehill_edge.session import Session, value
from molehill_protos.v1.bundle_pb2 import Task

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, ort.OrtValue]
Current = Callable[[], Inputs]  # of the gate, for the experts that are there when it is called; else the same object

_CHUNK = 512  # tokens read at once; bounds what the attention of a long prompt takes
_LOGITS = 1 << 23  # float32 numbers of one chunk's logits, where the graph gives all of them: 32 MB
_LAST, _ALL = np.array([-1], np.int64), np.array([0], np.int64)
_STEP = 256  # the cache grows by at least this many tokens


class Cache:
    """Keys and values of the tokens read so far, for a batch of one.

    Args:
        session: The graph.
        task: Of the manifest.
    """

    def __init__(self, session: Session, task: Task) -> None:
        self._session = session
        self._most = task.max_length
        self._shape = task.generation
        self._names = [f"{i}.{part}" for i in range(task.generation.layers) for part in ("key", "value")]
        # One assignment changes tokens and arrays together, so that an interrupt finds them fitting each other.
        self._state: tuple[list[int], list[Array]] = ([], self._arrays(0))
        self._inputs: Inputs | None = None  # the gate that computed all of it
        self._logits = np.empty((1, 0, 0), np.float32)
        self._last_only = LOGITS_FROM in session.overridable  # graphs of earlier versions give logits of all tokens
        self._held: dict[str, Any] = {}  # what the binding points at

    @property
    def tokens(self) -> list[int]:
        """Ids of what is in the cache."""
        return self._state[0]

    @property
    def gate(self) -> Inputs | None:
        """The gate that computed it."""
        return self._inputs

    def cut(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        tokens, arrays = self._state
        if length < len(tokens):
            if not self._shape.shared_buffer:
                arrays = [np.ascontiguousarray(array[:, :, :length]) for array in arrays]
            self._state = (tokens[:length], arrays)

    def read(self, ids: Sequence[int], current: Current) -> Array:
        """Make the cache hold ``ids`` and nothing else, and return the logits after the last, ``[vocabulary]``.

        Only what differs from the cache is computed. The result is valid until the next call.

        Args:
            ids: At least one token.
            current: The gate; after another one, or with other experts, nothing of the cache counts.

        Raises:
            BundleError: The tokens are too many, or the graph cannot be computed.
        """
        self._require_room(ids)
        chunk = _CHUNK if self._last_only else max(1, min(_CHUNK, _LOGITS // max(1, self._shape.vocabulary)))
        while True:
            with self._session.use() as graph:  # experts may change between two chunks, and only there
                inputs = current()
                if inputs is not self._inputs:
                    self._begin_with(inputs)
                self.cut(common(self.tokens, ids[:-1]))
                begin = len(self.tokens)
                logits = self._feed(graph, list(ids[begin : begin + chunk]), inputs)
            if begin + chunk >= len(ids):
                last: Array = logits[0, -1]
                return last

    def losses(self, ids: Sequence[int], current: Current) -> Array:
        """Minus the log probability of every token but the first, given those before, float32 ``[len(ids) - 1]``.

        All of them are read anew, and the cache holds all but the last.

        Args:
            ids: At least two tokens.
            current: The gate; with other experts meanwhile, all are read again.

        Raises:
            BundleError: The tokens are too many, or the graph cannot be computed.
        """
        self._require_room(ids)
        chunk = max(1, min(_CHUNK, _LOGITS // max(1, self._shape.vocabulary)))
        found = np.empty(len(ids) - 1, np.float32)
        self.cut(0)
        while (begin := len(self.tokens)) < len(found):
            with self._session.use() as graph:
                if (inputs := current()) is not self._inputs:
                    self._begin_with(inputs)
                    begin = 0
                part = list(ids[begin : min(begin + chunk, len(found))])
                shares = log_softmax(self._feed(graph, part, inputs, every=True)[0])
            end = begin + len(part)
            found[begin:end] = -shares[np.arange(len(part)), list(ids[begin + 1 : end + 1])]
        return found

    def _require_room(self, ids: Sequence[int]) -> None:
        if len(ids) > self._most:
            raise BundleError(f"{len(ids)} tokens, where {self._most} fit", mend="Give a shorter text.")

    def _begin_with(self, inputs: Inputs) -> None:
        """Forget what another gate has computed."""
        self.cut(0)
        self._inputs = inputs
        self._session.unbind(self)

    def _feed(self, graph: ort.InferenceSession, ids: list[int], inputs: Inputs, *, every: bool = False) -> Array:
        """Read further tokens: logits ``[1, tokens, vocabulary]``, perhaps of the last alone unless of every one."""
        tokens, arrays = self._state
        total = len(tokens) + len(ids)
        binding, new = self._session.binding(self, graph)
        if new:
            self._held = {}
            for name, bound in inputs.items():
                binding.bind_ortvalue_input(name, bound)
        begin = _ALL if every else _LAST
        if self._last_only and self._held.get(LOGITS_FROM) is not begin:
            self._hold(binding.bind_ortvalue_input, LOGITS_FROM, begin)
        given = 1 if self._last_only and not every else len(ids)
        if self._logits.shape[1] != given or new:
            self._logits = np.empty((1, given, self._shape.vocabulary), np.float32)
            self._hold(binding.bind_ortvalue_output, "logits", self._logits)
        self._hold(binding.bind_ortvalue_input, "input_ids", np.array([ids], np.int64))
        self._hold(binding.bind_ortvalue_input, "attention_mask", np.ones((1, total), np.int64))
        if not self._shape.shared_buffer:
            presents = self._arrays(total)
        else:
            presents = arrays = self._room(arrays, total)
        for name, past, present in zip(self._names, arrays, presents, strict=True):
            if self._held.get(f"present.{name}") is not present or not self._shape.shared_buffer:
                self._hold(binding.bind_ortvalue_input, f"past_key_values.{name}", past)
                self._hold(binding.bind_ortvalue_output, f"present.{name}", present)
        graph.run_with_iobinding(binding)
        self._state = (tokens + ids, presents)
        return self._logits

    def _hold(self, bind: Callable[[str, ort.OrtValue], None], name: str, array: Array) -> None:
        bind(name, value(array))
        self._held[name] = array

    def _room(self, arrays: list[Array], length: int) -> list[Array]:
        """Buffers with room for so many tokens."""
        if arrays[0].shape[2] >= length:
            return arrays
        larger = self._arrays(min(self._most, max(length, 2 * arrays[0].shape[2], _STEP)))
        for old, new in zip(arrays, larger, strict=True):
            new[:, :, : old.shape[2]] = old
        return larger

    def _arrays(self, length: int) -> list[Array]:
        return [np.zeros((1, self._shape.heads, length, self._shape.head_dim), np.float32) for _ in self._names]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:  # far quicker than one at a time, and so at every token of an answer
        return shorter
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """Ids of a text that goes on: without the special tokens that the tokenizer writes at an end.

    Args:
        tokenizer: Of the bundle.
        text: A text.
        special: Whether the tokenizer adds its special tokens.

    Raises:
        BundleError: The text has no tokens, or the tokenizer fails.
    """
    encoded = tokens.encode(tokenizer, text, special=special)
    ids = list(encoded.ids)
    while special and len(ids) > 1 and encoded.offsets[len(ids) - 1] == (0, 0):
        ids.pop()
    if not ids:
        raise BundleError("the text has no tokens", mend="Give a text.")
    return ids


def reader(tokenizer: Tokenizer, task: Task) -> Reader:
    """What answers of a bundle have to know of its tokens."""
    return Reader(lambda ids: tokens.decode(tokenizer, ids), frozenset(task.generation.eos), task.max_length)
