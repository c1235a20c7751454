"""A bundle in use: classify, generate, change its gate and its experts."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from molehill import files
from molehill.errors import BundleError
from molehill_edge import classify, experts, gates, generate, personalise, routes
from molehill_edge import manifest as manifests
from molehill_edge.classify import Prediction
from molehill_edge.gates import Gate
from molehill_edge.generate import Answer, Asked, Cache, Stream
from molehill_edge.personalise import Outcome
from molehill_edge.prompts import Message, Prompts
from molehill_edge.routes import RouterReport
from molehill_edge.sampling import Sampling
from molehill_edge.session import Session, value
from molehill_protos.v1.bundle_pb2 import Manifest

if TYPE_CHECKING:
    from molehill_edge.trust import Admitted, Trust

Array = np.ndarray[Any, Any]

DEFAULT = "default"  # the gate that came as the bundle's own
_STATE, _OWN_GATE = "state.json", "gate.safetensors"


@dataclass
class _Engine:
    """What all views of one bundle share."""

    admitted: Admitted  # keeps the folder there
    manifest: Manifest  # with the experts that are there now
    session: Session
    tokenizer: Tokenizer
    prompts: Prompts | None  # of a causal LM
    rows: dict[tuple[str, int], Array] = field(default_factory=dict)  # of added experts, by gate tensor and slot
    changes: int = 0  # of the experts
    run: experts.RunFolder | None = None

    @property
    def folder(self) -> Path:
        """As it was admitted; never written to."""
        return self.admitted.folder


@dataclass(frozen=True)
class _Bound:
    """A gate as the graph takes it, for the experts that are there."""

    gate: Gate
    changes: int
    arrays: Mapping[str, Array]  # kept: the values below only point at them
    inputs: Mapping[str, ort.OrtValue]


class View:
    """A bundle as one owner sees it: with a gate of its own, and everything else shared.

    Views of one bundle may be used from several threads, one thread each; what has a view of its own per thread never
    sees another's gate. Made by `Bundle.open` and `with_gate`.
    """

    def __init__(self, engine: _Engine, gate: Gate) -> None:
        self._engine = engine
        self._now = _bind(engine, gate)

    @property
    def manifest(self) -> Manifest:
        """What the bundle is, with the experts that are in its slots now."""
        return self._engine.manifest

    @property
    def gate(self) -> Gate:
        """The gate in use."""
        return self._now.gate

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
        self._now = _bind(self._engine, self._resolve(gate))

    def choose_experts(self, names: Sequence[str]) -> None:
        """Choose from these routed experts only, with the gate in use; `swap_gate` undoes it.

        Args:
            names: Ids of experts.

        Raises:
            BundleError: There is no such expert, it is shared, or a router would be left without experts.
        """
        manifest = self.manifest
        wanted = {_find(manifest, name) for name in names}
        always = [manifest.slots[slot].id for slot in wanted if manifest.slots[slot].shared]
        if always:
            raise BundleError(f"expert {always[0]} is shared by all tokens anyway", mend="Leave it out.")
        mask = self.gate.mask & np.isin(gates.slots(manifest), list(wanted))
        self.swap_gate(replace(self.gate, mask=mask))

    def read_gate(self, gate: Path | str) -> Gate:
        """Read a gate, so that swapping it takes no time.

        Args:
            gate: A gate file, the name of one in the bundle, or ``default``.

        Raises:
            BundleError: There is none, or it does not fit this bundle.
        """
        engine = self._engine
        if gate == DEFAULT:
            return gates.read(engine.folder / manifests.GATE, engine.manifest)
        inside = f"gates/{gate}.safetensors"
        if any(file.path == inside for file in engine.manifest.files):
            return gates.read(engine.folder / inside, engine.manifest)
        if isinstance(gate, str) and not Path(gate).exists():
            known = ", ".join([DEFAULT, *self.gates()])
            mend = f"Give a gate file or one of: {known}."
            raise BundleError(f"no gate {gate!r}", where=str(engine.folder), mend=mend)
        return gates.read(Path(gate), engine.manifest)

    def gates(self) -> list[str]:
        """Names of the gates that came with the bundle beside its default."""
        paths = [Path(file.path) for file in self._engine.manifest.files]
        return [path.stem for path in paths if path.parent == Path("gates")]

    def _resolve(self, gate: Gate | Path | str) -> Gate:
        return gate if isinstance(gate, Gate) else self.read_gate(gate)

    def _bound(self) -> _Bound:
        """The gate, for the experts that are there now."""
        now = self._now
        if now.changes != self._engine.changes:
            self._now = now = _bind(self._engine, now.gate)
        return now

    def classify(self, texts: Sequence[str], *, truncate: bool = False) -> list[Prediction]:
        """Say which label each text has.

        A text may come out a little differently in a batch when the bundle is int8, since activations are rounded
        together; a call with one text is always the same.

        Args:
            texts: The texts.
            truncate: Let texts that are too long lose their end.

        Raises:
            BundleError: The bundle generates text, or a text is too long or has no tokens.
        """
        labels = self._labels()
        found = classify.softmax(self.logits(self.encode_all(texts, truncate=truncate)))
        best = found.argmax(-1)
        return [Prediction(labels[i], float(row[i]), tuple(row.tolist())) for i, row in zip(best, found, strict=True)]

    def logits(self, encoded: Sequence[Sequence[int]]) -> Array:
        """Logits of texts of a classifier.

        Args:
            encoded: Their ids.

        Returns:
            ``[texts, classes]``.

        Raises:
            BundleError: The graph cannot be computed.
        """
        found = np.zeros((len(encoded), len(self.manifest.task.labels)), np.float32)
        for rows, ids, mask in classify.batches(encoded, classify.pad_of(self._engine.tokenizer)):
            found[rows] = self.forward(ids, mask, ["logits"])[0]
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
        feeds = {**self._bound().inputs, "input_ids": value(ids), "attention_mask": value(mask)}
        shape = self.manifest.task.generation
        past = np.zeros((len(ids), shape.heads, 0, shape.head_dim), np.float32)
        for i in range(shape.layers):
            feeds[f"past_key_values.{i}.key"] = feeds[f"past_key_values.{i}.value"] = value(past)
        return self._engine.session.run(outputs, feeds)

    def encode(self, text: str, *, raw: bool = False) -> list[int]:
        """Ids that the model reads for a text: as it is for a classifier, as an instruction for a causal LM.

        Args:
            text: The text.
            raw: Leave the prompt's format out.

        Raises:
            BundleError: The text has no tokens, or the chat template refuses it.
        """
        engine = self._engine
        if engine.prompts is None:
            return list(engine.tokenizer.encode(text).ids)
        if raw:
            return generate.encode(engine.tokenizer, text, special=True)
        return generate.encode(engine.tokenizer, engine.prompts.single(text), special=engine.prompts.special)

    def encode_all(self, texts: Sequence[str], *, truncate: bool = False) -> list[list[int]]:
        """Ids of texts to classify.

        Args:
            texts: The texts.
            truncate: Let texts that are too long lose their end.

        Raises:
            BundleError: A text is too long or has no tokens.
        """
        most = self.manifest.task.max_length
        return classify.encode(self._engine.tokenizer, texts, most, truncate=truncate)

    def gate_tensors(self) -> dict[str, Array]:
        """The tensors of the gate in use, with the rows of experts that were added."""
        arrays = self._bound().arrays
        return {tensor.name: arrays[tensor.name] for tensor in self.manifest.gate}

    def personalise(
        self, texts: Sequence[str], labels: Sequence[str] | None = None, *, seed: int = 0, budget: int = 80
    ) -> Outcome:
        """Fit the gate's bias and mask to texts of the owner; `Outcome.gate` is for `swap_gate` and `gates.write`.

        Args:
            texts: What is too long loses its end. About a third is held out to judge the result.
            labels: One for each, for a classifier; the search goes without when None.
            seed: Equal seeds give equal results.
            budget: How many times the texts may be read.

        Raises:
            BundleError: The texts are too few, a label is unknown, or the bundle has no router.
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
    ) -> Stream:
        """Answer a prompt piece by piece; the arguments are those of `generate`.

        Raises:
            BundleError: As `generate`.
        """
        asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), tuple(stop))
        engine = self._causal()
        task = engine.manifest.task
        ids = self.encode(prompt, raw=raw)
        return Stream(Cache(engine.session, task), ids, self._bound().inputs, engine.tokenizer, task, asked)

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

        Raises:
            BundleError: The bundle classifies, prompt and answer are too long together, or an option makes no sense.
        """
        stream = self.stream(
            prompt, raw=raw, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop=stop, seed=seed,
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
        return cache.read(ids, self._bound().inputs)

    def chat(
        self,
        *,
        system: str = "",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Chat:
        """Begin a conversation.

        Args:
            system: What the model is told first; nothing when empty.
            temperature: As for `generate`, like the rest.
            top_k: Likeliest tokens to draw from.
            top_p: Their probability together.
            seed: Of the draws.

        Raises:
            BundleError: The bundle classifies, or an option makes no sense.
        """
        engine = self._causal()
        return Chat(
            self, Cache(engine.session, engine.manifest.task), system, Sampling(temperature, top_k, top_p, seed)
        )

    def route_report(self, text: str, *, per_token: bool = False, truncate: bool = False) -> list[RouterReport]:
        """Say which experts a text used, for every router.

        Args:
            text: A text, or an instruction for a causal LM.
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
        weights = self.forward(
            np.array([ids], np.int64), np.ones((1, len(ids)), np.int64), routes.outputs(self.manifest)
        )
        return routes.report(self.manifest, weights, len(ids), per_token=per_token)

    def _causal(self) -> _Engine:
        if self._engine.prompts is None:
            raise BundleError("the bundle classifies; it does not generate text", where=self._engine.manifest.id)
        return self._engine

    def _labels(self) -> Sequence[str]:
        if self._engine.prompts is not None:
            raise BundleError("the bundle generates text; it does not classify", where=self._engine.manifest.id)
        return self._engine.manifest.task.labels


class Chat:
    """A conversation; what was read and said before is not computed again.

    Args:
        view: The bundle with a gate. Another gate or other experts take effect at once, at the cost of reading again.
        cache: An empty one.
        system: What the model is told first.
        sampling: How tokens are drawn.
    """

    def __init__(self, view: View, cache: Cache, system: str, sampling: Sampling) -> None:
        self._view = view
        self._cache = cache
        self._sampling = sampling
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def stream(self, text: str, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()) -> Stream:
        """Answer piece by piece; the arguments are those of `say`.

        Raises:
            BundleError: As `say`.
        """
        engine = self._view._causal()  # noqa: SLF001  # halves of one thing
        assert engine.prompts is not None
        asked = Asked(max_new_tokens, self._sampling, tuple(stop))
        turn = {"role": "user", "content": text}
        prompt = engine.prompts.before_answer([*self.messages, turn])
        ids = generate.encode(engine.tokenizer, prompt, special=engine.prompts.special)

        def done(answer: Answer) -> None:
            if answer.tokens:
                self.messages += [turn, {"role": "assistant", "content": answer.text}]

        bound = self._view._bound()  # noqa: SLF001
        return Stream(self._cache, ids, bound.inputs, engine.tokenizer, engine.manifest.task, asked, done)

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


class Bundle(View):
    """A bundle that is open; close it, or use it as a context manager."""

    @classmethod
    def open(
        cls, name: Path | str, *, trust: Trust, threads: int | None = None, memory_mb: int | None = None
    ) -> Bundle:
        """Check a bundle and open it.

        Nothing of it is opened before everything was checked.

        Args:
            name: A folder, an archive or an id, whatever ``trust`` admits.
            trust: Says which bundles may be opened.
            threads: For one operator; all cores of this process when None.
            memory_mb: Memory that the bundle may take, in MiB. Inputs that would need more are refused.

        Raises:
            BundleError: The bundle is damaged, does not fit this device, or needs more memory.
            TrustError: Nobody vouches for it.
        """
        admitted = trust.admit(name)
        try:
            folder, manifest = admitted.folder, admitted.manifest
            default = gates.read(folder / manifests.GATE, manifest)
            prompts = None
            if manifest.task.kind == "causal-lm":
                prompts = Prompts(manifest.task.generation, manifest.id)
            tokenizer = _tokenizer(folder / manifests.TOKENIZER)
            session = Session(folder, manifest, threads=threads, memory_mb=memory_mb)
            _check_graph(session, manifest)
            return cls(_Engine(admitted, _copy(manifest), session, tokenizer, prompts), default)
        except BaseException:
            admitted.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory; all views of the bundle end with it."""
        self._engine.session.close()
        if self._engine.run is not None:
            self._engine.run.remove()
            self._engine.run = None
        self._engine.admitted.close()

    def remove_expert(self, name: str) -> None:
        """Never choose an expert again; its slot is free for another.

        Args:
            name: Its id.

        Raises:
            BundleError: There is none, it is shared, or a router would be left without experts.
        """
        engine = self._engine
        slot = _find(engine.manifest, name)
        if engine.manifest.slots[slot].shared:
            raise BundleError(f"expert {name} is shared by all tokens and cannot be removed", where=engine.manifest.id)
        changed = _copy(engine.manifest)
        changed.slots[slot].id = ""
        for router in changed.routers:
            if slot in router.slots and not any(changed.slots[other].id for other in router.slots):
                raise BundleError(f"expert {name} is the last of router {router.name}", where=engine.manifest.id)
        _check_mask(changed, self.gate)
        engine.manifest = changed
        engine.rows = {key: row for key, row in engine.rows.items() if key[1] != slot}
        engine.changes += 1

    def add_expert(self, path: Path) -> str:
        """Put an expert into an empty slot.

        Args:
            path: An expert file.

        Returns:
            Its id.

        Raises:
            BundleError: It does not fit the bundle, or there is no empty slot; the bundle stays as it was.
        """
        engine = self._engine
        expert = experts.read(path, engine.manifest)
        slot = experts.find_slot(expert, engine.manifest, str(path))
        data = experts.place(expert, slot, engine.manifest, _read(engine.session.folder / manifests.EXPERTS))
        self._exchange(data)
        changed = _copy(engine.manifest)
        changed.slots[slot].id = expert.id
        engine.rows.update({(tensor, slot): row for tensor, row in expert.rows.items()})
        engine.manifest = changed
        engine.changes += 1
        return expert.id

    def _exchange(self, data: bytes) -> None:
        """Go on with other bytes of experts.safetensors."""
        engine = self._engine
        paths = [file.path for file in engine.manifest.files]
        run = experts.RunFolder(engine.folder, paths, data)
        try:
            engine.session.exchange(run.path)
        except BaseException:
            run.remove()
            raise
        if engine.run is not None:
            engine.run.remove()
        engine.run = run
        weakref.finalize(self, run.remove)

    def save_state(self, folder: Path) -> None:
        """Keep what this device changed: the gate in use and the experts that were added and removed.

        Args:
            folder: For these files only; made when it is not there.

        Raises:
            BundleError: It cannot be written.
        """
        engine = self._engine
        state = {
            "format": 1,
            "base": engine.manifest.base.digest,
            "layout": engine.manifest.layout.hex(),
            "slots": [slot.id for slot in engine.manifest.slots],
            "rows": sorted({slot for _, slot in engine.rows}),
        }
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if engine.run is not None:
                files.write(folder / manifests.EXPERTS, _read(engine.run.path / manifests.EXPERTS))
            own = replace(self.gate, tensors=self.gate_tensors())
            gates.write(folder / _OWN_GATE, own, engine.manifest)
            files.write(folder / _STATE, json.dumps(state).encode(), mode=files.PRIVATE)
        except OSError as error:
            raise BundleError(f"cannot write it: {error.strerror}", where=str(folder)) from None

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` kept; the bundle must be as it was opened.

        Args:
            folder: As given there.

        Raises:
            BundleError: It is damaged or of another bundle.
        """
        engine = self._engine
        where = str(folder)
        try:
            state = json.loads(_read(folder / _STATE))
            names = [str(name) for name in state["slots"]]
            rows = [int(slot) for slot in state["rows"]]
            fits = (state["base"], state["layout"]) == (engine.manifest.base.digest, engine.manifest.layout.hex())
        except (ValueError, KeyError, TypeError):
            raise BundleError("damaged", where=str(folder / _STATE)) from None
        if not fits or len(names) != len(engine.manifest.slots) or not set(rows) <= set(range(len(names))):
            raise BundleError("the state of another bundle", where=where)
        gate = gates.read(folder / _OWN_GATE, engine.manifest)
        if (folder / manifests.EXPERTS).is_file():
            data, old = _read(folder / manifests.EXPERTS), _read(engine.folder / manifests.EXPERTS)
            if _layout(data) != _layout(old):
                raise BundleError("its experts are stored in another way", where=where)
            self._exchange(data)
        changed = _copy(engine.manifest)
        for slot, name in zip(changed.slots, names, strict=True):
            slot.id = name
        engine.manifest = changed
        engine.rows = {
            (tensor.name, slot): _row(gate.tensors[tensor.name], tensor.expert_axis, list(router.slots).index(slot))
            for tensor in changed.gate
            if tensor.expert_axis >= 0
            for router in [changed.routers[tensor.router]]
            for slot in rows
            if slot in router.slots
        }
        engine.changes += 1
        self.swap_gate(gate)


def _bind(engine: _Engine, gate: Gate) -> _Bound:
    """Make a gate's inputs, with the rows of added experts and without the experts that are not there."""
    changes, manifest = engine.changes, engine.manifest
    arrays = dict(gate.tensors)
    for tensor in manifest.gate:
        added = [(slot, row) for (name, slot), row in engine.rows.items() if name == tensor.name]
        if added:
            arrays[tensor.name] = arrays[tensor.name].copy()
            members = list(manifest.routers[tensor.router].slots)
            for slot, row in added:
                np.moveaxis(arrays[tensor.name], tensor.expert_axis, 0)[members.index(slot)] = row
    if manifest.routers:
        arrays[gates.BIAS] = gate.bias
        arrays[gates.MASK] = _check_mask(manifest, gate)
    return _Bound(gate, changes, arrays, {name: value(array) for name, array in arrays.items()})


def _check_mask(manifest: Manifest, gate: Gate) -> Array:
    """The experts that may be chosen, at least one for each router."""
    mask: Array = gate.mask & gates.usable(manifest)
    begins = gates.starts(manifest)
    for router, begin, end in zip(manifest.routers, begins[:-1], begins[1:], strict=True):
        if not mask[begin:end].any():
            raise BundleError(f"gate {gate.name} leaves router {router.name} without experts", where=manifest.id)
    return mask


def _check_graph(session: Session, manifest: Manifest) -> None:
    """The graph takes and gives what the manifest says."""
    wanted = {"input_ids", "attention_mask", *(tensor.name for tensor in manifest.gate)}
    if manifest.routers:
        wanted |= {gates.BIAS, gates.MASK}
    parts = [f"{i}.{part}" for i in range(manifest.task.generation.layers) for part in ("key", "value")]
    wanted |= {f"past_key_values.{part}" for part in parts}
    gives = {"logits", *routes.outputs(manifest), *(f"present.{part}" for part in parts)}
    missing = (wanted - session.inputs.keys() - session.overridable) | (gives - set(session.outputs))
    if missing:
        session.close()
        raise BundleError(f"the graph lacks {min(missing)}", where=manifest.id, mend="Export it again.")


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # the library raises nothing more particular
        raise BundleError(f"cannot be read: {error}", where=str(path)) from None
    tokenizer.no_truncation()  # as stored it may do either, unasked
    tokenizer.no_padding()
    return tokenizer


def _find(manifest: Manifest, name: str) -> int:
    found = [i for i, slot in enumerate(manifest.slots) if slot.id == name]
    if not found or not name:
        known = ", ".join(slot.id for slot in manifest.slots if slot.id)
        raise BundleError(f"no expert {name!r}", where=manifest.id, mend=f"There are: {known}.")
    return found[0]


def _copy(manifest: Manifest) -> Manifest:
    copied = Manifest()
    copied.CopyFrom(manifest)
    return copied


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read it: {error.strerror}", where=str(path)) from None


def _row(array: Array, axis: int, index: int) -> Array:
    row: Array = np.take(array, index, axis)
    return row


def _layout(data: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(array.dtype), array.shape) for name, array in experts.views(bytearray(data)).items()}
