"""A conversation with a bundle: what was read and said before is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from molehill.decoding.interfaces import Strategy
from molehill.decoding.prompts import Message
from molehill.decoding.sampling import Sampling
from molehill.decoding.stream import Answer, Asked, Stream
from molehill_edge.engine import Binding, Engine
from molehill_edge.generate import encode, reader
from molehill_edge.passes import EdgePasses


class Chat:
    """One conversation.

    Args:
        engine: Of a bundle that generates text.
        bound: The gate in use. Another one or other experts take effect at once, at the cost of reading again.
        system: What the model is told first.
        sampling: How tokens are drawn.
        strategy: How they follow from passes of the model; by its own logits when None.

    Attributes:
        passes: What keeps what was read; others of the bundle may take their place.
        messages: What was said.
    """

    def __init__(
        self, engine: Engine, bound: Callable[[], Binding], system: str, sampling: Sampling,
        strategy: Strategy | None = None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._sampling = sampling
        self._strategy, self.passes = strategy, EdgePasses(engine, bound)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def encode(self, text: str) -> list[int]:
        """Ids of the conversation up to the answer to a text.

        Raises:
            BundleError: The chat template or the tokenizer refuses it.
        """
        engine = self._engine
        assert engine.prompts is not None
        prompt = engine.prompts.before_answer([*self.messages, {"role": "user", "content": text}])
        return encode(engine.tokenizer, prompt, special=engine.prompts.special)

    def stream(self, text: str, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()) -> Stream:
        """Answer piece by piece; the arguments are those of `say`.

        Raises:
            BundleError: As `say`.
        """
        engine, ids = self._engine, self.encode(text)
        asked = Asked(max_new_tokens, self._sampling, stop)
        turn = {"role": "user", "content": text}

        def done(answer: Answer) -> None:
            if answer.tokens:
                self.messages += [turn, {"role": "assistant", "content": answer.text}]

        read = reader(engine.tokenizer, engine.manifest.task)
        return self.passes.answering(self._strategy, ids, read, asked, done)

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Say something and get the answer; both become part of the conversation, as far as it came.

        Args:
            text: What is said.
            max_new_tokens: Longest answer; when None, up to 256 that fit.
            stop: Strings that end the answer and are not shown.
            on_text: Called with each piece of text as it comes.

        Raises:
            BundleError: The conversation is too long; it stays as it was.
        """
        return self.stream(text, max_new_tokens=max_new_tokens, stop=stop).rest(on_text)
