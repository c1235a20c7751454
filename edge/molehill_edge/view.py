"""A bundle as one owner sees it: what it answers, with a gate of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from molehill.decoding import DEFAULT as OWN_LOGITS
from molehill.decoding import options
from molehill.decoding.interfaces import Learns, Strategy, Through, all_of
from molehill.decoding.sampling import Sampling, check_finite
from molehill.decoding.stream import Answer, Asked, Stream
from molehill.errors import AnswerError, BundleError
from molehill.outputs import Shown
from molehill.predictions import Class, Prediction
from molehill.rowfiles.pairs import Text
from molehill_edge import classify, examples, gates, generate, personalise, routes, tokens
from molehill_edge import manifest as manifests
from molehill_edge.chat import Chat
from molehill_edge.engine import Binding, Engine, find_expert
from molehill_edge.gates import Gate
from molehill_edge.generate import Cache, reader
from molehill_edge.passes import EdgePasses
from molehill_edge.personalise import Outcome
from molehill_edge.routes import RouterReport
from molehill_edge.session import value
from molehill_protos.v1.bundle_pb2 import Manifest

Array = np.ndarray[Any, Any]

DEFAULT = "default"  # the gate that came as the bundle's own


class View:
    """A bundle as one owner sees it: with a gate of its own, and everything else shared.

    Views of one bundle may be used from several threads, one thread each; what has a view of its own per thread never
    sees another's gate. Made by `Bundle.open` and `with_gate`.
    """

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._bound = Binding(engine, gate)

    @property
    def manifest(self) -> Manifest:
        """What the bundle is, with the experts that are in its slots now."""
        return self._engine.manifest

    @property
    def gate(self) -> Gate:
        """The gate in use."""
        return self._bound.gate

    def with_gate(self, gate: Gate | Path | str) -> View:
        """Return a view with another gate on the same graph.

        Args:
            gate: As for `swap_gate`.

        Raises:
            BundleError: As `swap_gate`.
        """
        return View(self._engine, self._resolve(gate))

    def swap_gate(self, gate: Gate | Path | str) -> None:
        """Use another gate from the next call on.

        Args:
            gate: A gate that was read, a gate file, the name of one in the bundle, or ``default``.

        Raises:
            BundleError: There is none, or it does not fit this bundle; the gate of before stays in use.
        """
        self._bound = Binding(self._engine, self._resolve(gate))

    def choose_experts(self, names: Sequence[str]) -> None:
        """Choose from these routed experts only, with the gate in use; `swap_gate` undoes it.

        Experts that are added later may be chosen beside them.

        Args:
            names: Ids of experts.

        Raises:
            BundleError: There is no such expert, it is shared, or a router would be left without experts.
        """
        manifest = self.manifest
        wanted = {find_expert(manifest, name) for name in names}
        always = [manifest.slots[slot].id for slot in wanted if manifest.slots[slot].shared]
        if always:
            raise BundleError(f"expert {always[0]} is shared by all tokens anyway", mend="Leave it out.")
        allowed = np.isin(gates.slots(manifest), list(wanted)) | ~gates.usable(manifest)
        mask = self.gate.mask & allowed
        self.swap_gate(replace(self.gate, mask=mask))

    def read_gate(self, gate: Path | str) -> Gate:
        """Read a gate, so that swapping it takes no time.

        Args:
            gate: A gate file, the name of one in the bundle, or ``default``.

        Raises:
            BundleError: There is none, or it does not fit this bundle.
        """
        engine = self._engine
        found = gates.read(self._path_of(gate), engine.manifest, engine.added)
        _ = found.values  # made here, so that swapping need not
        return found

    def _path_of(self, gate: Path | str) -> Path:
        engine = self._engine
        if gate == DEFAULT:
            return engine.folder / manifests.GATE
        inside = f"gates/{gate}.safetensors"
        if any(file.path == inside for file in engine.manifest.files):
            return engine.folder / inside
        named = [path for name, path in self._named() if gate in {name, f"client:{name}"}]
        if len(named) == 1:
            return named[0]
        if isinstance(gate, str) and not Path(gate).exists():
            known = ", ".join([DEFAULT, *self.gates()])
            mend = f"Give a gate file or one of: {known}."
            raise BundleError(f"no gate {gate!r}", where=engine.manifest.id, mend=mend)
        return Path(gate)

    def gates(self) -> list[str]:
        """Names of the gates that came with the bundle beside its default."""
        return [name for name, _ in self._named()]

    def _named(self) -> list[tuple[str, Path]]:
        """Gates of the bundle by the names that they have in them: a file's own may lack letters."""
        paths = [Path(file.path) for file in self._engine.manifest.files]
        found = [self._engine.folder / path for path in paths if path.parent == Path("gates")]
        return [(gates.load(path, "gate")[1].get("name", path.stem), path) for path in found]

    def _resolve(self, gate: Gate | Path | str) -> Gate:
        return gate if isinstance(gate, Gate) else self.read_gate(gate)

    @property
    def by_places(self) -> bool:
        """Whether its graph can choose experts by their places among a router's logits, as some strategies ask."""
        return self.passes().by_places

    def passes(self, after: EdgePasses | None = None) -> EdgePasses:
        """What strategies ask: passes of the bundle with the gate in use.

        Args:
            after: Passes of this bundle that nobody uses any more: what they have read with this gate is kept.
        """
        return EdgePasses(self._engine, lambda: self._bound, after)

    def strategy(
        self, name: str | Strategy | None = None, params: Mapping[str, Any] | None = None, through: Through = all_of
    ) -> Strategy:
        """Build a strategy, if this bundle can do it; one that learns reads its rows here.

        Args:
            name: Of a method of decoding, the model's own logits when None; what was built is checked, and taken as it
                is.
            params: Its parameters.
            through: As of `molehill.decoding.interfaces.Learns.learn`.

        Raises:
            AnswerError: A parameter is wrong, or the strategy is for another kind of model or for hosts only.
            BundleError: A row that it learns from has no tokens.
            ConfigError: There is no such strategy.
            DataError: The rows that it learns from cannot be read.
        """
        if isinstance(name, Strategy):
            made, called = name, type(name).__name__
            if params:
                raise AnswerError("a strategy that is built already takes no parameters")
        else:
            called = OWN_LOGITS if name is None else name
            made = options.build("decoding", called, params)
        if not made.on_device:
            raise AnswerError(
                f"strategy {called} is host_only: it asks for more of a model than a bundle gives",
                where="--strategy", mend="Ask the run: molehill generate.",
            )  # fmt: skip
        passes = self.passes()
        options.require_fits(made, called, passes, several=manifests.reading(self.manifest.task).several)
        if made is not name and isinstance(made, Learns) and made.rows:
            made.learn(passes, examples.read(self._engine, Path(made.rows)), through)
        return made

    def predict(
        self,
        texts: Sequence[Text],
        *,
        truncate: bool = False,
        strategy: str | Strategy | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> list[Prediction]:
        """Say of each text what the bundle is for: its class, which labels it has, a number, or its entities.

        A text may come out a little differently in a batch when the bundle is int8, since activations are rounded
        together; a call with one text is always the same.

        Args:
            texts: The texts, or pairs of them for a bundle that learnt from pairs.
            truncate: Let texts that are too long lose their end.
            strategy: How the classes follow from passes of the model; its own logits when None.
            params: Parameters of the strategy.

        Raises:
            AnswerError: The strategy is none for this bundle, or a parameter is wrong.
            BundleError: The bundle generates text, a text is too long or has no tokens, or the graph cannot be computed
                or answers with numbers that are not finite.
        """
        self._require_predicts()
        return self.predicted(texts, self.encode_all(texts, truncate=truncate), self._asked(strategy, params))

    def predicted(
        self, texts: Sequence[Text], encoded: Sequence[Sequence[int]], strategy: Strategy | None
    ) -> list[Prediction]:
        """What the bundle says of texts.

        Args:
            texts: The texts.
            encoded: Their ids.
            strategy: As of `scores`.

        Raises:
            AnswerError: As `scores`.
            BundleError: As `scores`.
        """
        task = self.manifest.task
        reading, about = manifests.reading(task), manifests.about(task)
        if not reading.by_token:
            return [reading.read(scores, about) for scores in self.scores(encoded, strategy)]
        shown = [self._shown(text, len(ids)) for text, ids in zip(texts, encoded, strict=True)]
        logits = self.logits_of_tokens(encoded)  # there is no other strategy for tokens
        return [reading.read(scores, about, where) for scores, where in zip(logits, shown, strict=True)]

    def _shown(self, text: Text, length: int) -> Shown:
        """Where the tokens of a text are in it, by how many there are.

        Raises:
            BundleError: It is a pair of texts.
        """
        if not isinstance(text, str):
            what = f"the bundle is for {self.manifest.task.kind}: it reads no pairs of texts"
            raise BundleError(what, where=self.manifest.id)
        tokenizer = self._engine.tokenizer
        found = tokens.encode(tokenizer, text)
        if len(found.ids) > length:
            found = tokens.encode(tokens.truncated(tokenizer, length), text)
        return Shown(text, found.offsets, found.word_ids)

    def classify(
        self,
        texts: Sequence[Text],
        *,
        truncate: bool = False,
        strategy: str | Strategy | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> list[Class]:
        """Say which label each text has; `predict` of a bundle whose texts have one each.

        Args:
            texts: As of `predict`, like the rest.
            truncate: Let texts that are too long lose their end.
            strategy: How the classes follow from passes of the model.
            params: Parameters of the strategy.

        Raises:
            AnswerError: As `predict`.
            BundleError: As `predict`, or texts have no class of this bundle.
        """
        task = self.manifest.task
        if self._engine.prompts is None and not manifests.reading(task).several:
            what = f"the bundle is for {task.kind}: it does not say which of several classes a text has"
            raise BundleError(what, where=self.manifest.id, mend="Ask it: predict.")
        found = self.predict(texts, truncate=truncate, strategy=strategy, params=params)
        return [each for each in found if isinstance(each, Class)]

    def scores(self, encoded: Sequence[Sequence[int]], strategy: Strategy | None) -> Array:
        """Scores of the classes, or of the token after a text, of which the largest is likeliest.

        Args:
            encoded: Ids of the texts.
            strategy: One for this bundle; its own logits when None, for classes.

        Returns:
            ``[texts, V]``.

        Raises:
            AnswerError: The strategy cannot be done with this bundle, or with such a text.
            BundleError: The graph cannot be computed, or answers with numbers that are not finite.
        """
        if strategy is None:
            return self.logits(encoded)
        passes = self.passes()
        found = np.array([strategy.begin(passes, ids)(ids) for ids in encoded])
        check_finite(found.max(-1))  # others may be -inf
        return found

    def _asked(self, strategy: str | Strategy | None, params: Mapping[str, Any] | None) -> Strategy | None:
        """The strategy that is asked for, if any is."""
        return self.strategy(strategy, params) if strategy is not None or params else None

    def logits(self, encoded: Sequence[Sequence[int]]) -> Array:
        """Logits of texts of a bundle that does not write.

        Args:
            encoded: Their ids.

        Returns:
            ``[texts, C]``, C as `molehill_edge.manifest.outputs` has it.

        Raises:
            BundleError: The graph cannot be computed, or answers with numbers that are not finite.
        """
        found = np.zeros((len(encoded), manifests.outputs(self.manifest.task)), np.float32)
        with self._engine.session.use() as graph:  # all of them with the same experts
            for rows, ids, mask in classify.batches(encoded, classify.pad_of(self._engine.tokenizer)):
                found[rows] = self._compute(graph, ids, mask, ["logits"])[0]
        check_finite(found)
        return found

    def logits_of_tokens(self, encoded: Sequence[Sequence[int]]) -> list[Array]:
        """Logits of every token of texts, of a bundle that says something of tokens.

        Args:
            encoded: Their ids.

        Returns:
            For every text ``[tokens, C]``.

        Raises:
            BundleError: The graph cannot be computed, or answers with numbers that are not finite.
        """
        found: list[Array] = [np.zeros(0)] * len(encoded)
        with self._engine.session.use() as graph:
            for rows, ids, mask in classify.batches(encoded, classify.pad_of(self._engine.tokenizer)):
                for row, logits in zip(rows, self._compute(graph, ids, mask, ["logits"])[0], strict=True):
                    found[row] = logits[: len(encoded[row])]
                    check_finite(found[row])
        return found

    def forward(self, ids: Array, mask: Array, outputs: list[str]) -> list[Array]:
        """Compute outputs of the graph for tokens that nothing comes before.

        Args:
            ids: int64 ``[batch, sequence]``.
            mask: 1 for real tokens, int64 ``[batch, sequence]``.
            outputs: Their names.

        Raises:
            BundleError: The graph cannot be computed.
        """
        with self._engine.session.use() as graph:
            return self._compute(graph, ids, mask, outputs)

    def _compute(self, graph: ort.InferenceSession, ids: Array, mask: Array, outputs: list[str]) -> list[Array]:
        if not outputs:  # ONNX Runtime takes that for all of them
            return []
        feeds = {**self._bound.inputs(), "input_ids": value(ids), "attention_mask": value(mask)}
        shape = self.manifest.task.generation
        past = np.zeros((len(ids), shape.heads, 0, shape.head_dim), np.float32)
        for i in range(shape.layers):
            feeds[f"past_key_values.{i}.key"] = feeds[f"past_key_values.{i}.value"] = value(past)
        return [found.numpy() for found in graph.run_with_ort_values(outputs, feeds)]

    def encode(self, text: Text, *, raw: bool = False) -> list[int]:
        """Ids that the model reads for a text: as an instruction for a causal LM, else as it is.

        Args:
            text: The text, or a pair of texts.
            raw: Leave the prompt's format out.

        Raises:
            BundleError: The text has no tokens, the tokenizer or the chat template refuses it, or it is a pair and the
                bundle writes.
        """
        engine = self._engine
        if engine.prompts is None:
            return list(tokens.encode(engine.tokenizer, text).ids)
        if not isinstance(text, str):
            raise BundleError("the bundle generates text; it reads no pairs of texts", where=engine.manifest.id)
        if raw:
            return generate.encode(engine.tokenizer, text, special=True)
        return generate.encode(engine.tokenizer, engine.prompts.single(text), special=engine.prompts.special)

    def encode_all(self, texts: Sequence[Text], *, truncate: bool = False) -> list[list[int]]:
        """Ids of texts that something is said of.

        Args:
            texts: The texts, or pairs of them.
            truncate: Let texts that are too long lose their end.

        Raises:
            BundleError: A text is too long or has no tokens.
        """
        most = self.manifest.task.max_length
        return classify.encode(self._engine.tokenizer, texts, most, truncate=truncate)

    def gate_tensors(self) -> dict[str, Array]:
        """The tensors of the gate in use, with the rows of experts that were added."""
        arrays = self._bound.now().arrays
        return {tensor.name: arrays[tensor.name] for tensor in self.manifest.gate}

    def personalise(
        self, texts: Sequence[Text], labels: Sequence[Any] | None = None, *, seed: int = 0, budget: int = 80
    ) -> Outcome:
        """Fit the gate's bias and mask to texts of the owner; `Outcome.gate` is for `swap_gate` and `gates.write`.

        Args:
            texts: What is too long loses its end. About a third is held out to judge the result.
            labels: One for each, of the bundle's kind: a class, a list of labels, or a number. For classes the search
                goes without when None.
            seed: Equal seeds give equal results.
            budget: How many times the texts may be read.

        Raises:
            BundleError: The texts are too few, labels are missing, or the bundle has no router.
            DataError: A label is none of the bundle's kind.
        """
        return personalise.personalise(self, texts, labels, seed=seed, budget=budget)

    def stream(
        self,
        prompt: str,
        *,
        raw: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        passes: EdgePasses | None = None,
        strategy: str | Strategy | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Answer a prompt piece by piece; the arguments are those of `generate`, and passes of this view to use.

        Raises:
            AnswerError: As `generate`.
            BundleError: As `generate`.
        """
        asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop)
        engine = self._causal()
        ids, read = self.encode(prompt, raw=raw), reader(engine.tokenizer, engine.manifest.task)
        passes = self.passes() if passes is None else passes
        return passes.answering(self._asked(strategy, params), ids, read, asked)

    def generate(
        self,
        prompt: str,
        *,
        raw: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        strategy: str | Strategy | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer a prompt.

        Args:
            prompt: An instruction; it is put into the format of training.
            raw: Go on with the prompt as it is instead.
            max_new_tokens: Longest answer; when None, up to 256 that fit.
            temperature: 0 takes the likeliest token each time.
            top_k: Draw from this many likeliest tokens; 0 for all.
            top_p: Draw from the fewest likeliest tokens that have this probability together.
            stop: Strings that end the answer and are not shown.
            seed: Equal seeds give equal answers.
            on_text: Called with each piece of text as it comes.
            strategy: How the next token follows from passes of the model (``molehill methods decoding``); its own
                logits when None.
            params: Parameters of the strategy.

        Raises:
            AnswerError: Prompt and answer are too long together, an option makes no sense, or the strategy is none for
                this bundle.
            BundleError: The bundle classifies, or the graph cannot be computed.
        """
        stream = self.stream(
            prompt, raw=raw, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop=stop, seed=seed, strategy=strategy, params=params,
        )  # fmt: skip
        return stream.rest(on_text)

    def cache(self) -> Cache:
        """An empty cache of keys and values, for `read`.

        Raises:
            BundleError: The bundle classifies.
        """
        engine = self._causal()
        return Cache(engine.session, engine.manifest.task)

    def read(self, cache: Cache, ids: Sequence[int]) -> Array:
        """Logits after the last of some tokens, ``[vocabulary]``; only those that the cache lacks are computed.

        Args:
            cache: Of this bundle.
            ids: At least one token.

        Raises:
            BundleError: The tokens are too many, or the graph cannot be computed.
        """
        return cache.read(ids, self._bound.inputs)

    def chat(
        self,
        *,
        system: str = "",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        strategy: str | Strategy | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Chat:
        """Begin a conversation.

        Args:
            system: What the model is told first; nothing when empty.
            temperature: As for `generate`, like the rest.
            top_k: Likeliest tokens to draw from.
            top_p: Their probability together.
            seed: Of the draws.
            strategy: As for `generate`.
            params: Parameters of the strategy.

        Raises:
            AnswerError: An option makes no sense, or the strategy is none for this bundle.
            BundleError: The bundle classifies.
        """
        engine, sampling = self._causal(), Sampling(temperature, top_k, top_p, seed)
        return Chat(engine, lambda: self._bound, system, sampling, self._asked(strategy, params))

    def route_report(self, text: Text, *, per_token: bool = False, truncate: bool = False) -> list[RouterReport]:
        """Say which experts a text used, for every router.

        Args:
            text: A text, a pair of texts, or an instruction for a causal LM.
            per_token: Name the best expert of each token too.
            truncate: Let a text that is too long lose its end.

        Raises:
            BundleError: The text is too long.
        """
        ids = self.encode(text)
        most = self.manifest.task.max_length
        if len(ids) > most and not truncate:
            raise BundleError(f"the text has {len(ids)} tokens, where {most} fit", mend="Give a shorter text.")
        ids = ids[:most]
        row = np.array([ids], np.int64)
        with self._engine.session.use() as graph:
            manifest = self.manifest  # before experts change again
            weights = self._compute(graph, row, np.ones_like(row), routes.outputs(manifest))
        return routes.report(manifest, weights, len(ids), per_token=per_token)

    def _causal(self) -> Engine:
        if self._engine.prompts is None:
            raise BundleError("the bundle classifies; it does not generate text", where=self._engine.manifest.id)
        return self._engine

    def _require_predicts(self) -> None:
        if self._engine.prompts is not None:
            raise BundleError("the bundle generates text; it does not classify", where=self._engine.manifest.id)
