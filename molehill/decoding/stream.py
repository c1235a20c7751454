"""One answer, token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from molehill.decoding.interfaces import Scores
from molehill.decoding.sampling import Sampler, Sampling
from molehill.decoding.text import Stops, Text
from molehill.errors import AnswerError

ANSWER = 256  # tokens of an answer when nobody says how many


@dataclass(frozen=True)
class Answer:
    """What a causal LM said.

    Attributes:
        text: Without the stop string or special tokens.
        ids: The tokens that were drawn, the one that ended it included.
        prompt_tokens: Length of the prompt.
        fed: Tokens of the prompt that were not in the cache.
        reason: Why it ended: the model ended it, a stop string came, or it is as long as it may be.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    fed: int
    reason: Literal["end", "stop", "length"]

    @property
    def tokens(self) -> int:
        """How many tokens were drawn."""
        return len(self.ids)


@dataclass(frozen=True)
class Reader:
    """What an answer has to know of a model's tokens.

    Attributes:
        decode: The text of tokens, without special ones.
        ends: Tokens that end an answer.
        longest: Tokens of prompt and answer together.
    """

    decode: Callable[[list[int]], str]
    ends: frozenset[int]
    longest: int


def room(prompt: int, wanted: int | None, most: int) -> int:
    """How many tokens an answer may have.

    Args:
        prompt: Tokens of the prompt.
        wanted: What was asked for; None for some that fit.
        most: What the model takes, prompt and answer together.

    Raises:
        AnswerError: Prompt and answer do not fit.
    """
    if wanted is not None and wanted < 1:
        raise AnswerError("an answer must have room for at least one token")
    if prompt + (wanted or 1) > most:
        answer = f" and {wanted} for the answer" if wanted else ""
        raise AnswerError(
            f"the prompt has {prompt} tokens{answer}, where {most} fit together",
            mend="Give a shorter text or begin a new conversation." if prompt >= most else "Ask for a shorter answer.",
        )
    return wanted or min(ANSWER, most - prompt)


@dataclass(frozen=True)
class Asked:
    """Everything that decides an answer but its prompt.

    Attributes:
        max_new_tokens: Longest answer; when None, up to 256 that fit.
        sampling: How tokens are drawn.
        stop: Strings that end the answer and are not shown.

    Raises:
        AnswerError: One of them is of another type.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and not isinstance(self.max_new_tokens, int):
            raise AnswerError(f"the longest answer must be a number of tokens, not {self.max_new_tokens!r:.40}")
        if isinstance(self.stop, str):
            raise AnswerError("stop is one string, where several go", mend=f"Give [{self.stop!r:.40}].")
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        for each in self.stop:
            if not isinstance(each, str):
                raise AnswerError(f"a stop string must be text, not {each!r:.40}")

    def numbered(self, number: int) -> Asked:
        """The same for one of several answers, from 0: a seed is that of the first, the next has the next."""
        if self.sampling.seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=self.sampling.seed + number))


def replayed(tokens: Sequence[int], end: int | None, prompt: int, reader: Reader, stop: Sequence[str]) -> Answer:
    """What a `Stream` would have told of tokens that were drawn without one: it ends at the first stop string.

    Args:
        tokens: That were drawn, without the one that ended them.
        end: That one, where there is one.
        prompt: Tokens of the prompt, all of which were read.
        reader: Of the model's tokens.
        stop: Strings that end the answer.

    Raises:
        AnswerError: A stop string is empty.
    """
    text, stops, shown = Text(reader.decode), Stops(stop), ""
    for number, token in enumerate(tokens, 1):
        shown += stops.push(text.push(token))
        if stops.hit:
            return Answer(shown, tuple(tokens[:number]), prompt, prompt, "stop")
    shown += stops.push(text.flush())
    drawn = tuple(tokens) if end is None else (*tokens, end)
    if stops.hit:
        return Answer(shown, drawn, prompt, prompt, "stop")
    return Answer(shown + stops.flush(), drawn, prompt, prompt, "length" if end is None else "end")


class Stream(Iterator[str]):
    """An answer as pieces of text; `answer` holds what came so far, all of it at the end.

    Args:
        scores: What gives the logits after all tokens so far.
        ids: The prompt.
        reader: Of the model's tokens.
        asked: How to answer.
        fed: Tokens of the prompt that are to be read.
        done: Called once, at the end or when the stream is closed before.

    Raises:
        AnswerError: Prompt and answer are too long, or an option makes no sense.
    """

    def __init__(
        self,
        scores: Scores,
        ids: Sequence[int],
        reader: Reader,
        asked: Asked,
        *,
        fed: int | None = None,
        done: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        most = room(len(ids), asked.max_new_tokens, reader.longest)
        self.answer = Answer("", (), len(ids), len(ids) if fed is None else fed, "length")
        self._done = done
        self._ends = reader.ends
        self._stops = Stops(asked.stop)
        self._text = Text(reader.decode)
        self._sampler = Sampler(asked.sampling)
        self._pieces = self._draw(scores, list(ids), most)

    def __next__(self) -> str:
        while not (piece := self.step()):
            if piece is None:
                raise StopIteration
        return piece

    def step(self) -> str | None:
        """Draw one token: the text that it completes, which may be none; None after the last.

        Raises:
            MolehillError: The model cannot be computed.
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
            MolehillError: The model cannot be computed.
        """
        try:
            for piece in self:
                if on_text is not None:
                    on_text(piece)
        finally:
            self.close()
        return self.answer

    def _draw(self, scores: Scores, ids: list[int], most: int) -> Generator[str]:
        for _ in range(most):
            token = self._sampler(scores(ids))
            ids.append(token)
            drawn = (*self.answer.ids, token)
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
                self._note(piece, self.answer.ids, "stop")
            else:
                piece += self._stops.flush()
                self._note(piece, self.answer.ids, self.answer.reason)
            if piece:
                yield piece
        self._finish()

    def _note(self, piece: str, drawn: tuple[int, ...], reason: Literal["end", "stop", "length"]) -> None:
        before = self.answer
        self.answer = Answer(before.text + piece, drawn, before.prompt_tokens, before.fed, reason)

    def _finish(self) -> None:
        done, self._done = self._done, lambda _: None
        done(self.answer)
