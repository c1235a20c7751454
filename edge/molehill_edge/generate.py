"""Answers of a causal LM, token by token: the cache of keys and values, stop strings, and text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from molehill.errors import BundleError
from molehill_edge import tokens
from molehill_edge.manifest import LOGITS_FROM
from molehill_edge.sampling import Sampler, Sampling
from molehill_edge.session import Session, value
from molehill_protos.v1.bundle_pb2 import Task

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, ort.OrtValue]
Current = Callable[[], Inputs]  # of the gate, for the experts that are there when it is called; else the same object
Pieces = Iterator[str]

_CHUNK = 512  # tokens read at once; bounds what the attention of a long prompt takes
_LOGITS = 1 << 23  # float32 numbers of one chunk's logits, where the graph gives all of them: 32 MB
_LAST = np.array([-1], np.int64)
_STEP = 256  # the cache grows by at least this many tokens
ANSWER = 256  # tokens of an answer when nobody says how many
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Answer:
    """What a causal LM said.

    Attributes:
        text: Without the stop string or special tokens.
        tokens: How many tokens were drawn, the one that ended it included.
        prompt_tokens: Length of the prompt.
        fed: Tokens of the prompt that were not in the cache.
        reason: Why it ended: the model ended it, a stop string came, or it is as long as it may be.
    """

    text: str
    tokens: int
    prompt_tokens: int
    fed: int
    reason: Literal["end", "stop", "length"]


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
        if len(ids) > self._most:
            raise BundleError(f"{len(ids)} tokens, where {self._most} fit", mend="Give a shorter text.")
        chunk = _CHUNK if self._last_only else max(1, min(_CHUNK, _LOGITS // max(1, self._shape.vocabulary)))
        while True:
            with self._session.use() as graph:  # experts may change between two chunks, and only there
                inputs = current()
                if inputs is not self._inputs:
                    self.cut(0)
                    self._inputs = inputs
                    self._session.unbind(self)
                self.cut(common(self.tokens, ids[:-1]))
                begin = len(self.tokens)
                logits = self._feed(graph, list(ids[begin : begin + chunk]), inputs)
            if begin + chunk >= len(ids):
                last: Array = logits[0, -1]
                return last

    def _feed(self, graph: ort.InferenceSession, ids: list[int], inputs: Inputs) -> Array:
        tokens, arrays = self._state
        total = len(tokens) + len(ids)
        binding, new = self._session.binding(self, graph)
        if new:
            self._held = {}
            for name, bound in inputs.items():
                binding.bind_ortvalue_input(name, bound)
            if self._last_only:
                self._hold(binding.bind_ortvalue_input, LOGITS_FROM, _LAST)
        given = 1 if self._last_only else len(ids)
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


class Text:
    """Turns tokens into text as they come, never showing part of a character.

    Args:
        tokenizer: Of the bundle.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was returned
        self._begin = 0  # decoding begins here: some tokens before, since how a token reads depends on its neighbours

    def push(self, token: int) -> str:
        """Return the text that a further token completes."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(_BROKEN):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is left, without a character that was not completed."""
        text = self._new().rstrip(_BROKEN)
        self._begin = self._shown = len(self._ids)
        return text

    def _new(self) -> str:
        shown = self._decode(self._ids[self._begin : self._shown])
        return self._decode(self._ids[self._begin :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return tokens.decode(self._tokenizer, ids) if ids else ""


class Stops:
    """Holds text back that may become a stop string.

    Args:
        stops: Strings that end an answer.

    Raises:
        BundleError: One is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise BundleError("a stop string is empty", mend="Leave it out.")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Return what may be shown; after a stop string, `hit` is set and nothing more may."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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


def room(prompt: int, wanted: int | None, most: int) -> int:
    """How many tokens an answer may have.

    Args:
        prompt: Tokens of the prompt.
        wanted: What was asked for; None for some that fit.
        most: What the bundle takes, prompt and answer together.

    Raises:
        BundleError: Prompt and answer do not fit.
    """
    if wanted is not None and wanted < 1:
        raise BundleError("an answer must have room for at least one token")
    if prompt + (wanted or 1) > most:
        answer = f" and {wanted} for the answer" if wanted else ""
        raise BundleError(
            f"the prompt has {prompt} tokens{answer}, where {most} fit together",
            mend="Give a shorter text or begin a new conversation." if prompt >= most else "Ask for a shorter answer.",
        )
    return wanted or min(ANSWER, most - prompt)


@dataclass(frozen=True)
class Asked:
    """Everything that decides an answer but its prompt."""

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


class Stream(Iterator[str]):
    """An answer as pieces of text; `answer` holds what came so far, all of it at the end.

    Args:
        cache: Holds the beginning of the prompt, or something else that is dropped.
        ids: The prompt.
        current: The gate; when experts come or go meanwhile, the rest is drawn with those that are there then.
        tokenizer: Of the bundle.
        task: Of the manifest.
        asked: How to answer.
        done: Called once, at the end or when the stream is closed before.

    Raises:
        BundleError: Prompt and answer are too long, or an option makes no sense.
    """

    def __init__(
        self,
        cache: Cache,
        ids: Sequence[int],
        current: Current,
        tokenizer: Tokenizer,
        task: Task,
        asked: Asked,
        done: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        most = room(len(ids), asked.max_new_tokens, task.max_length)
        shared = common(cache.tokens, ids[:-1]) if cache.gate is current() else 0
        self.answer = Answer("", 0, len(ids), len(ids) - shared, "length")
        self._done = done
        self._ends = frozenset(task.generation.eos)
        self._stops = Stops(asked.stop)
        self._text = Text(tokenizer)
        self._sampler = Sampler(asked.sampling)
        self._pieces = self._draw(cache, list(ids), current, most)

    def __next__(self) -> str:
        while not (piece := self.step()):
            if piece is None:
                raise StopIteration
        return piece

    def step(self) -> str | None:
        """Draw one token: the text that it completes, which may be none; None after the last.

        Raises:
            BundleError: The graph cannot be computed.
        """
        try:
            return next(self._pieces, None)
        except BaseException:  # also Ctrl-C: what came so far is the answer
            self._finish()
            raise

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()
        self._finish()

    def rest(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Draw all that is left.

        Args:
            on_text: Called with each piece.

        Raises:
            BundleError: The graph cannot be computed.
        """
        try:
            for piece in self:
                if on_text is not None:
                    on_text(piece)
        finally:
            self.close()
        return self.answer

    def _draw(self, cache: Cache, ids: list[int], current: Current, most: int) -> Generator[str]:
        for drawn in range(1, most + 1):
            token = self._sampler(cache.read(ids, current))
            ids.append(token)
            if token in self._ends:
                self._note("", drawn, "end")
                break
            piece = self._stops.push(self._text.push(token))
            self._note(piece, drawn, "stop" if self._stops.hit else "length")
            yield piece
            if self._stops.hit:
                break
        if not self._stops.hit:
            piece = self._stops.push(self._text.flush())
            if self._stops.hit:
                self._note(piece, self.answer.tokens, "stop")
            else:
                piece += self._stops.flush()
                self._note(piece, self.answer.tokens, self.answer.reason)
            if piece:
                yield piece
        self._finish()

    def _note(self, piece: str, drawn: int, reason: Literal["end", "stop", "length"]) -> None:
        before = self.answer
        self.answer = Answer(before.text + piece, drawn, before.prompt_tokens, before.fed, reason)

    def _finish(self) -> None:
        done, self._done = self._done, lambda _: None
        done(self.answer)
