"""A trained model that is asked: by its own gate, a client's, or as one expert alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from molehill.characters import flaw
from molehill.decoding import DEFAULT, options, ranking
from molehill.decoding.interfaces import BASE, OWN, Learns, Setting, Strategy, Through, all_of, other
from molehill.decoding.prompts import Prompts
from molehill.decoding.sampling import Sampling, check_finite
from molehill.decoding.stream import Answer, Asked, Reader, Stream, replayed
from molehill.errors import AnswerError, ConfigError
from molehill.molora.decode import TorchPasses, only, write
from molehill.outputs import About, Reading, Shown, reading_of
from molehill.predictions import Class, Prediction
from molehill.rowfiles.messages import PLAIN
from molehill.rowfiles.pairs import Text
from molehill.tasks.chat import Chat
from molehill.tasks.kind import kind_of
from molehill_protos.v1.bundle_pb2 import Generation
from molehill_simulation.beside import Beside, open_beside
from molehill_simulation.prompts import examples_of
from molehill_simulation.source import AS, GLOBAL, Source, open_source

_EXPERT = "expert:"
_BASE = "base"  # nobody's gate: the model without experts


class Loaded:
    """A trained model; close it, or use it as a context manager. Made by `load`.

    Args:
        source: The run or adapter.
        who: Whose gate: ``global``, a client, an expert (``expert:`` before one that is called like a client) for that
            expert alone, or ``base`` for the base without experts.
        others: Models that strategies may ask beside it, by what they call them.

    Raises:
        AnswerError: Routers look at later tokens and it is to write.
        ConfigError: There is nobody of this name.
    """

    def __init__(self, source: Source, who: str = GLOBAL, others: Mapping[str, Beside] | None = None) -> None:
        self.source, self.who, self._others = source, who, dict(others or {})
        self._enter()

    def _enter(self) -> None:
        source = self.source
        self._held = ExitStack()
        self._within, gate = self._resolved(self.who)
        self._model = self._held.enter_context(source.gate(gate))
        try:
            self._passes = TorchPasses(
                self._model, within=self._within, others={name: each.passes for name, each in self._others.items()}
            )
            self._prompts: Prompts | None = None
            self._reader: Reader | None = None
            if self.writes:
                self._prompts = Prompts(_generation(source), str(source.name))
                self._reader = Reader(self._decode, frozenset(source.ends()), self._longest)
        except BaseException:
            self.close()
            raise

    def _resolved(self, who: str) -> tuple[Setting, str]:
        if not isinstance(who, str):
            raise ConfigError(f"whose gate is said by a name, not by {who!r:.40}", where="--as")
        source, name = self.source, who.removeprefix(_EXPERT)
        known = source.model.experts
        if who == _BASE and _BASE not in (*known, *source.clients()):
            return BASE, self._any_gate()
        if not who.strip():
            raise ConfigError("nobody is named", where="--as", mend=f"There are {GLOBAL}, {_BASE}, {', '.join(known)}.")
        if who.startswith(_EXPERT) or (name in known and name != GLOBAL and name not in source.clients()):
            if name not in known:
                raise ConfigError(f"there is no expert {name!r}", where="--as", mend=f"There are {', '.join(known)}.")
            shared = name.startswith("shared")
            return (OWN if shared else only(source.model, [name])), self._any_gate()
        return OWN, who

    def _any_gate(self) -> str:
        """A gate to be with, where it decides nothing: the shared one, or a client's where there is none."""
        try:
            with self.source.gate(GLOBAL):
                return GLOBAL
        except ConfigError:
            names = self.source.clients()
            if not names:
                raise
            return names[0]

    # ---- what it is ------------------------------------------------------------------------------------------

    @property
    def hf(self) -> nn.Module:
        """The Transformers module with its experts in place."""
        return self._model.base

    @property
    def writes(self) -> bool:
        """Whether it writes text; else it says something of texts, see `predict`."""
        return self._model.head is None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes; empty where it has none."""
        return self.about.labels

    @property
    def about(self) -> About:
        """What its numbers are about."""
        return About(tuple(self.source.adapter.labels), self.source.adapter.range)

    @property
    def reading(self) -> Reading:
        """How its numbers are read.

        Raises:
            AnswerError: Nothing reads them.
        """
        return reading_of(kind_of(self.source.task).bundle)

    @property
    def experts(self) -> tuple[str, ...]:
        """Ids of its experts."""
        return tuple(self._model.experts)

    @property
    def passes(self) -> TorchPasses:
        """What strategies ask."""
        return self._passes

    def expert(self, name: str) -> Loaded:
        """The same model as one expert alone, in place of this one.

        Raises:
            ConfigError: There is no such expert.
        """
        return self.instead(f"{_EXPERT}{name}")

    def instead(self, who: str) -> Loaded:
        """The same model with another gate. This one is closed: two gates cannot be in one model.

        Raises:
            ConfigError: There is nobody of this name; this one goes on.
        """
        self.close()
        try:
            return Loaded(self.source, who, self._others)
        except BaseException:
            self._enter()
            raise

    def close(self) -> None:
        """Put the model back to what it was loaded with; it answers no more."""
        if hasattr(self, "_passes"):
            self._passes.close()
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- writing ---------------------------------------------------------------------------------------------

    def encode(self, prompt: str, *, about: str = "", raw: bool = False) -> list[int]:
        """Ids that a causal LM reads for a prompt: in the format of training, or as it is.

        Args:
            prompt: An instruction.
            about: A text that it is about.
            raw: Go on with the prompt as it is instead.

        Raises:
            AnswerError: It has no tokens, or the chat template refuses it.
        """
        prompts, _ = self._writer()
        _require_text(prompt)
        if raw:
            return self._ids(prompt, special=True)
        return self._ids(prompts.single(prompt, about), special=prompts.special)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, where: str = "") -> list[int]:
        """Ids of a conversation up to where the answer to its last message begins.

        Args:
            messages: Turns with ``role`` and ``content``, and what else the base's chat template shows, such as calls
                of tools; the last is not the assistant's.
            tools: Descriptions of functions, as OpenAI writes them; None for none.
            where: Where they are from, for errors.

        Raises:
            AnswerError: It has no tokens, a role is unknown, or the chat template refuses it.
            DataError: The chat template does not show a part of it.
        """
        prompts, _ = self._writer()
        if tools is None and not any(turn.keys() - PLAIN for turn in messages):
            text = prompts.before_answer([{"role": turn["role"], "content": turn["content"]} for turn in messages])
            return self._ids(text, special=prompts.special)
        if prompts.special:
            what = "the base has no chat template, so nothing shows tools and what else messages have"
            raise AnswerError(what, where=where or self.source.name, mend="Give messages of role and content.")
        turns = [{**turn, "content": turn["content"].strip()} for turn in messages]
        return self._ids(Chat(self.source.tokenizer).before_answer(turns, tools, where), special=False)

    def setting(self, expert: str) -> Setting:
        """The setting of one expert, for `generate_all`; that of the base for no name.

        Raises:
            AnswerError: There is no such expert.
        """
        return only(self._model, [expert]) if expert else BASE

    def require_writes(self) -> None:
        """Refuse a classifier where text is wanted.

        Raises:
            AnswerError: The model classifies.
        """
        self._writer()

    def stream(
        self, prompt: str, *, raw: bool = False, strategy: str | Strategy = DEFAULT,
        params: Mapping[str, Any] | None = None, max_new_tokens: int | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        stop: Sequence[str] = (), seed: int | None = None,
    ) -> Stream:  # fmt: skip
        """Answer a prompt piece by piece; arguments as of `generate`.

        Raises:
            AnswerError: As `generate`.
        """
        asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop)
        return self.answering(self.encode(prompt, raw=raw), asked, self.strategy(strategy, params))

    def answering(
        self, ids: Sequence[int], asked: Asked, strategy: Strategy, done: Callable[[Answer], None] = lambda _: None
    ) -> Stream:
        """Answer tokens.

        Args:
            ids: Of a prompt.
            asked: How.
            strategy: Of `strategy`.
            done: Called once at the end.

        Raises:
            AnswerError: Prompt and answer are too long, or the strategy cannot be done with this model.
        """
        _, reader = self._writer()
        passes = self._passes.about(ids)
        return Stream(strategy.begin(passes, ids), ids, reader, asked, fed=len(ids) - passes.kept(ids), done=done)

    def generate(
        self, prompt: str, *, raw: bool = False, strategy: str | Strategy = DEFAULT,
        params: Mapping[str, Any] | None = None, max_new_tokens: int | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        stop: Sequence[str] = (), seed: int | None = None, on_text: Callable[[str], None] | None = None,
    ) -> Answer:  # fmt: skip
        """Answer a prompt.

        Args:
            prompt: An instruction; it is put into the format of training.
            raw: Go on with the prompt as it is instead.
            strategy: How the next token follows from the model's passes; ``molehill methods decoding`` lists them.
            params: Parameters of the strategy.
            max_new_tokens: Longest answer; when None, up to 256 that fit.
            temperature: 0 takes the likeliest token each time.
            top_k: Draw from this many likeliest tokens; 0 for all.
            top_p: Draw from the fewest likeliest tokens that have this probability together.
            stop: Strings that end the answer and are not shown.
            seed: Equal seeds give equal answers.
            on_text: Called with each piece of text as it comes.

        Raises:
            AnswerError: The model classifies, prompt and answer are too long together, or an option makes no sense.
        """
        stream = self.stream(
            prompt, raw=raw, strategy=strategy, params=params, max_new_tokens=max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, stop=stop, seed=seed,
        )  # fmt: skip
        return stream.rest(on_text)

    def generate_all(
        self, prompts: Sequence[Sequence[int]], asked: Asked, settings: Sequence[Setting] | None = None,
        at_once: int = 8,
    ) -> Iterator[Answer]:  # fmt: skip
        """Answer many prompts by the model's own logits, several in one pass, which may ask different experts each.

        Args:
            prompts: Ids, as of `encode`.
            asked: How.
            settings: One for each; that of this model for all when None.
            at_once: Rows of one pass.

        Yields:
            Answers in the order of the prompts.

        Raises:
            AnswerError: A prompt does not fit.
        """
        _, reader = self._writer()
        self._passes.require_open()
        said = [self._within] * len(prompts) if settings is None else list(settings)
        for ids, found in zip(prompts, write(self._model, prompts, reader, asked, said, at_once), strict=True):
            yield replayed(found.tokens, found.end, len(ids), reader, asked.stop)

    def scores(
        self, ids: Sequence[int], answers: Sequence[Answer], by: str = "likelihood", expert: str | None = None
    ) -> list[float]:
        """How good several answers to one prompt are; more is better.

        Args:
            ids: Of the prompt.
            answers: As this model gave them.
            by: Which score, of `molehill.decoding.ranking.RANKS`.
            expert: Who gave them, as of `setting`; this model when None.

        Raises:
            AnswerError: There is no such score or expert, the model classifies, or its numbers are not finite.
        """
        self.require_writes()
        drawn = [answer.ids for answer in answers]
        if expert is None:
            return ranking.scores(by, self._passes.about(ids), ids, drawn)
        return ranking.scores(by, TorchPasses(self._model), ids, drawn, self.setting(expert))

    # ---- saying something of texts -----------------------------------------------------------------------------

    def predict(
        self, texts: Sequence[Text], *, strategy: str | Strategy = DEFAULT, params: Mapping[str, Any] | None = None,
        truncate: bool = False,
    ) -> list[Prediction]:  # fmt: skip
        """Say of each text what the model was trained to: its class, which labels it has, a number, or its entities.

        Args:
            texts: The texts, or pairs of them for a model that learnt from pairs.
            strategy: How the classes follow from the model's passes.
            params: Parameters of the strategy.
            truncate: Let texts that are too long lose their end.

        Raises:
            AnswerError: The model writes or was closed, a text is none, is too long or has no tokens, or the strategy
                is none for this model.
        """
        if isinstance(texts, str):
            raise AnswerError("texts are one string, where several go", mend="Give a list: [text].")
        chosen, found, reading = self.strategy(strategy, params), [], self.reading
        for number, text in enumerate(texts):
            scores = chosen.begin(self._passes, ids := self._text(text, number, truncate=truncate))(ids)
            check_finite(scores[np.isfinite(scores)] if np.isfinite(scores).any() else scores)
            found.append(reading.read(scores, self.about, self._shown(text, len(ids)) if reading.by_token else None))
        return found

    def _shown(self, text: Text, length: int) -> Shown:
        """Where the tokens of a text are in it, by how many there are.

        Raises:
            AnswerError: It is a pair of texts.
        """
        if not isinstance(text, str):
            what = f"the model is for {self.source.task.kind}: it reads no pairs of texts"
            raise AnswerError(what, where=self.source.name)
        found = self.source.tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
        return Shown(text, found["offset_mapping"], found.word_ids(0))

    def classify(
        self, texts: Sequence[Text], *, strategy: str | Strategy = DEFAULT, params: Mapping[str, Any] | None = None,
        truncate: bool = False,
    ) -> list[Class]:  # fmt: skip
        """Say which label each text has; `predict` of a model whose texts have one each.

        Args:
            texts: As of `predict`, like the rest.
            strategy: How the classes follow from the model's passes.
            params: Parameters of the strategy.
            truncate: Let texts that are too long lose their end.

        Raises:
            AnswerError: As `predict`, or texts have no class of this model.
        """
        if not self.writes and not self.reading.several:
            what = f"the model is for {self.source.task.kind}: it does not say which of several classes a text has"
            raise AnswerError(what, where=self.source.name, mend="Ask it: predict.")
        found = self.predict(texts, strategy=strategy, params=params, truncate=truncate)
        return [each for each in found if isinstance(each, Class)]

    def _text(self, text: Text, number: int, *, truncate: bool) -> list[int]:
        if self.writes:
            raise AnswerError(
                "the model writes text; it does not classify", where=self.source.name, mend="Ask it: generate."
            )
        parts = tuple(text) if isinstance(text, tuple | list) and len(text) == 2 else (text,)
        if any(isinstance(part, str) and not part.strip() for part in parts):
            raise AnswerError(f"text {number + 1} is empty", mend="Leave it out.")
        ids = self._encoded(*parts)
        if len(ids) > self._longest:
            if not truncate:
                mend = "Give a shorter text, or let it lose its end (--truncate)."
                raise AnswerError(f"text {number + 1} has {len(ids)} tokens, where {self._longest} fit", mend=mend)
            ids = list(self.source.tokenizer(*parts, truncation=True, max_length=self._longest)["input_ids"])
        if not ids:
            raise AnswerError(f"text {number + 1} has no tokens", mend="Leave it out.")
        return ids

    # ---- both ------------------------------------------------------------------------------------------------

    def strategy(
        self, name: str | Strategy, values: Mapping[str, Any] | None = None, through: Through = all_of
    ) -> Strategy:
        """Build a strategy, if it is one for this model; one that learns reads its rows here.

        Args:
            name: Of a method of decoding; what was built is taken as it is.
            values: Its parameters.
            through: As of `molehill.decoding.interfaces.Learns.learn`.

        Raises:
            AnswerError: A parameter is wrong, or the model is not of the kind that it is for.
            ConfigError: There is no such strategy.
        """
        if isinstance(name, Strategy):
            return name
        made: Strategy = options.build("decoding", name, values)
        options.require_fits(made, name, self._passes, several=self.reading.several)
        for each in made.asks:
            other(self._passes, each)
        if idle := [each for each in self._others if each not in made.asks]:
            raise AnswerError(f"strategy {name} asks no {idle[0]} model", where=f"--{idle[0]}", mend="Leave it out.")
        if isinstance(made, Learns) and made.rows:
            made.learn(self._passes, examples_of(self.source, Path(made.rows)), through)
        return made

    @torch.no_grad()
    def route(self, text: Text, *, raw: bool = False, truncate: bool = False) -> dict[str, dict[str, float]]:
        """The share of every expert in what each router gave a text, by router.

        Args:
            text: A text, a pair of texts, or a prompt.
            raw: As of `encode`.
            truncate: As of `classify`.

        Raises:
            AnswerError: The text is too long or has no tokens.
        """
        ids = self._asked(text, raw=raw) if self.writes else self._text(text, 0, truncate=truncate)
        with self.counting() as shares:
            self._passes.forget()
            self._passes.logits(ids)
        return shares

    def _asked(self, text: Text, *, raw: bool) -> list[int]:
        if not isinstance(text, str):
            raise AnswerError("the model writes text; it reads no pairs of texts", where=self.source.name)
        return self.encode(text, raw=raw)

    def counting(self, *, on: bool = True) -> Counting:
        """A context in which shares of experts are counted over all that is computed."""
        return Counting(self, on)

    def counted(self) -> dict[str, dict[str, float]]:
        """Shares of the experts since counting began, by router."""
        model, found = self._model, {}
        for name, group in model.routers.items():
            site = model.site_of(group)
            ids = model.expert_ids(site)[site.shared :]
            mass = group.mass[0].double().cpu().numpy()
            found[name] = dict(zip(ids, (mass / max(mass.sum(), 1e-12)).tolist(), strict=True))
        return found

    @property
    def _longest(self) -> int:
        source = self.source
        if not self.writes:
            return min(source.limit, source.task.max_length)
        own = min(source.limit, getattr(source.text, "max_position_embeddings", source.limit))
        return min([own, *(each.limit for each in self._others.values())])

    def _writer(self) -> tuple[Prompts, Reader]:
        if self._prompts is None or self._reader is None:
            raise AnswerError(
                "the model classifies; it does not write text", where=self.source.name,
                mend="Give it texts: molehill generate, or predict in Python.",
            )  # fmt: skip
        return self._prompts, self._reader

    def _encoded(self, *parts: str) -> list[int]:
        for part in parts:
            _require_text(part)
        return list(self.source.tokenizer(*parts, verbose=False)["input_ids"])

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text that goes on: without the special tokens that the tokenizer writes at an end."""
        _require_text(text)
        found = self.source.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, places = list(found["input_ids"]), found["offset_mapping"]
        while special and len(ids) > 1 and tuple(places[len(ids) - 1]) == (0, 0):
            ids.pop()
        if not ids:
            raise AnswerError("the text has no tokens", mend="Give a text.")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self.source.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class Counting:
    """Counts the experts' shares inside a ``with``; the dictionary it gives is filled at the end."""

    def __init__(self, loaded: Loaded, on: bool) -> None:
        self._loaded, self._on = loaded, on
        self._found: dict[str, dict[str, float]] = {}

    def __enter__(self) -> dict[str, dict[str, float]]:
        self._loaded._model.count_tokens(on=self._on)  # noqa: SLF001  (of the same file)
        return self._found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._found.update(self._loaded.counted() if self._on else {})
        self._loaded._model.count_tokens(on=False)  # noqa: SLF001  (of the same file)


def load(
    path: Path | str, client: str | None = None, *, base: Path | str | None = None, state: Path | str | None = None,
    others: Mapping[str, str] | None = None,
) -> Loaded:  # fmt: skip
    """Load a finished run, an adapter folder, or a LoRA of peft, with its base.

    Args:
        path: The folder.
        client: Whose gate, as of `Loaded`; what all share when None.
        base: Where the base is, when it is not where the run had it.
        state: ``--state`` of a lab machine, for its personal gate.
        others: Folders or hub ids of causal LMs that a strategy asks beside it, by what it calls them.

    Raises:
        AdapterError: There is no adapter, it is damaged, or it belongs to another base.
        AnswerError: Another model has other tokens.
        ConfigError: There is nobody of this name.
        ModelError: The base or another model cannot be loaded.
    """
    source = open_source(
        Path(path), None if base is None else str(base), None if state is None else Path(state), option=AS
    )
    beside = {name: open_beside(source, model, f"--{name}") for name, model in (others or {}).items()}
    return Loaded(source, GLOBAL if client is None else client, beside)


def _require_text(text: str) -> None:
    if not isinstance(text, str):
        raise AnswerError(f"a text must be a string, not {type(text).__name__} {text!r:.40}")
    if wrong := flaw(text):
        raise AnswerError(f"the text {wrong}", mend="Write it anew.")


def _generation(source: Source) -> Generation:
    tokenizer, template = source.tokenizer, source.template()
    return Generation(
        template=bool(template), chat_template=template, bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
    )  # fmt: skip
