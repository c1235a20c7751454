"""An open bundle: checked, loaded, and its experts changed."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from molehill import files
from molehill.decoding.prompts import Prompts
from molehill.errors import BundleError, TrustError
from molehill_edge import experts, gates, routes, tokens
from molehill_edge import manifest as manifests
from molehill_edge.engine import Binding, Engine, Numbers, check_mask, find_expert
from molehill_edge.experts import Expert
from molehill_edge.gates import Gate
from molehill_edge.pool import Pool, choose
from molehill_edge.session import Session
from molehill_edge.view import View
from molehill_protos.v1.bundle_pb2 import Manifest

if TYPE_CHECKING:
    from molehill_edge.added import Added
    from molehill_edge.trust import Trust

Array = np.ndarray[Any, Any]

_STRICT = "this device takes signed experts only"
_TEXT = 8  # tokens, for which threads are measured where a text is read at once
_STATE, _OWN_GATE = "state.json", "gate.safetensors"


class Bundle(View):
    """A bundle that is open; close it, or use it as a context manager.

    Its experts are changed by one thread at a time; others may go on with what they do.
    """

    @classmethod
    def open(
        cls, name: Path | str, *, trust: Trust, threads: int | None = None, spin: bool | None = None,
        memory_mb: int | None = None,
    ) -> Bundle:  # fmt: skip
        """Check a bundle and open it.

        Nothing of it is opened before everything was checked.

        Args:
            name: A folder, an archive or an id, whatever ``trust`` admits.
            trust: Says which bundles may be opened.
            threads: For one operator; when None, one or all that this process may use, whatever is faster now.
            spin: Whether they wait for work awake during a call; whatever is faster now when None.
            memory_mb: Memory that the bundle may take, in MiB. Inputs that would need more are refused.

        Raises:
            BundleError: The bundle is damaged, does not fit this device, or needs more memory.
            TrustError: Nobody vouches for it.
        """
        admitted = trust.admit(name)
        try:
            folder, manifest = admitted.folder, admitted.manifest
            default = gates.read(folder / manifests.GATE, manifest)
            prompts, rows = None, _TEXT
            if manifests.reading(manifest.task).writes:
                rows = 1
                prompts = Prompts(manifest.task.generation, manifest.id)
            tokenizer = tokens.load(folder / manifests.TOKENIZER)
            session = Session(folder, manifest, pool=choose(rows, threads, spin=spin), memory_mb=memory_mb)
            _check_graph(session, manifest)
            opened = cls(Engine(admitted, _copy(manifest), session, tokenizer, prompts), default)
        except BaseException:
            admitted.close()
            raise
        try:
            opened._take_up()
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def pool(self) -> Pool:
        """Threads that compute it."""
        return self._engine.session.pool

    def _take_up(self) -> None:
        """Put the experts that this device adds into their slots."""
        engine = self._engine
        given, engine.admitted.experts = engine.admitted.experts, ()  # their bytes are not needed any longer
        try:
            self._put([(experts.parse(data, engine.manifest, added.id), added.id) for added, data in given])
        except BundleError as error:
            name = engine.manifest.id
            where = f"expert {error.where}, which this device adds to bundle {name}"
            mend = f"Run: molehill edge update --id {name}, or: molehill edge remove {name} {error.where}"
            raise BundleError(error.what, where=where, mend=mend) from None
        engine.kept = tuple(added for added, _ in given)

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
        """Never choose an expert again; its slot is free for another. One that was added is taken out altogether.

        Args:
            name: Its id.

        Raises:
            BundleError: There is none, it is shared, or a router would be left without experts.
        """
        engine = self._engine
        slot = find_expert(engine.manifest, name)
        if engine.manifest.slots[slot].shared:
            raise BundleError(f"expert {name} is shared by all tokens and cannot be removed", where=engine.manifest.id)
        changed = _copy(engine.manifest)
        changed.slots[slot].id = ""
        for router in changed.routers:
            if slot in router.slots and not any(changed.slots[other].id for other in router.slots):
                raise BundleError(f"expert {name} is the last of router {router.name}", where=engine.manifest.id)
        data = None
        if slot in engine.added:
            data = experts.clear(slot, engine.manifest, _read(engine.session.folder / manifests.EXPERTS))
        self._change(changed, {key: row for key, row in engine.rows.items() if key[1] != slot}, data, self.gate)

    def add_expert(self, path: Path) -> str:
        """Put an expert into an empty slot; the gate in use may choose it.

        Args:
            path: An expert file.

        Returns:
            Its id.

        Raises:
            BundleError: It does not fit the bundle, or there is no empty slot; the bundle stays as it was.
            TrustError: This device takes signed experts only.
        """
        engine = self._engine
        if engine.admitted.signed_experts_only:
            raise TrustError(f"{_STRICT}, and a file is not signed", where=str(path), mend=_mend(engine.manifest.id))
        expert = experts.read(path, engine.manifest)
        self._put([(expert, str(path))])
        return expert.id

    def _put(self, found: Sequence[tuple[Expert, str]]) -> None:
        """Put experts into empty slots, all or none.

        Args:
            found: The experts, each with its file, for errors.

        Raises:
            BundleError: One does not fit, or there is no empty slot.
        """
        if not found:
            return
        engine = self._engine
        changed, rows, mask = _copy(engine.manifest), dict(engine.rows), self.gate.mask
        data = _read(engine.session.folder / manifests.EXPERTS)
        for expert, where in found:
            slot = experts.find_slot(expert, changed, where)
            data = experts.place(expert, slot, changed, data)
            changed.slots[slot].id = expert.id
            rows |= {(tensor, slot): row for tensor, row in expert.rows.items()}
            # One that was left out may have had the slot before.
            mask = mask | (np.array(gates.slots(changed)) == slot)
        self._change(changed, rows, data, replace(self.gate, mask=mask))

    @property
    def added(self) -> tuple[Added, ...]:
        """The experts that the store adds at every opening; `add_expert` adds for this one only, unsigned."""
        return self._engine.kept

    def _change(self, manifest: Manifest, rows: dict[tuple[str, int], Array], data: bytes | None, gate: Gate) -> None:
        """Go on with other experts, at once or not at all; no call that runs sees a part of it.

        Args:
            manifest: With the experts.
            rows: Of those that were added.
            data: Of experts.safetensors; as it is when None.
            gate: To be used from now on.

        Raises:
            BundleError: The gate leaves a router without experts, or the graph cannot be opened with them.
        """
        engine = self._engine
        check_mask(Numbers.of(manifest), gate)
        run = None
        if data is not None:
            run = experts.RunFolder(engine.folder, [file.path for file in engine.manifest.files], data)
        try:
            with engine.session.alone():
                if run is not None:
                    engine.session.exchange(run.path)
                engine.change(manifest, rows)
                self._bound = Binding(engine, gate)
        except BaseException:
            if run is not None and engine.session.folder != run.path:
                run.remove()
            raise
        if run is not None:
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
            "experts": _experts_of(engine),
        }
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if engine.run is not None:
                changed = _read(engine.run.path / manifests.EXPERTS)
                files.write(folder / manifests.EXPERTS, changed, mode=files.PRIVATE)
            own = replace(self.gate, tensors=self.gate_tensors())
            gates.write(folder / _OWN_GATE, own, engine.manifest)
            files.write(folder / _STATE, json.dumps(state).encode(), mode=files.PRIVATE)
        except OSError as error:
            what = f"cannot write it: {error.strerror}"
            raise BundleError(what, where=str(folder), mend=files.cure(error)) from None

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` kept; the bundle must be as it was opened.

        Args:
            folder: As given there.

        Raises:
            BundleError: It is damaged or of another bundle.
            TrustError: It holds experts that are not signed, and this device takes signed ones only.
        """
        engine, where = self._engine, str(folder)
        names, rows = self._read_state(folder)
        changed = _copy(engine.manifest)
        for slot, name in zip(changed.slots, names, strict=True):
            slot.id = name
        gate = gates.read(folder / _OWN_GATE, changed)
        if engine.admitted.signed_experts_only:
            # Its numbers are nobody's: those of the signed files stay, and it says only which of them are left out.
            for now, then in zip(changed.slots, engine.manifest.slots, strict=True):
                if now.id not in {"", then.id}:
                    what = f"{_STRICT}, and expert {now.id} of this state is not signed"
                    raise TrustError(what, where=where, mend=_mend(engine.manifest.id))
            self._change(changed, {key: row for key, row in engine.rows.items() if names[key[1]]}, None, gate)
            return
        data = None
        if (folder / manifests.EXPERTS).is_file():
            data, old = _read(folder / manifests.EXPERTS), _read(engine.folder / manifests.EXPERTS)
            if _layout(data) != _layout(old):
                raise BundleError("its experts are stored in another way", where=where)
        kept = {
            (tensor.name, slot): _row(gate.tensors[tensor.name], tensor.expert_axis, list(router.slots).index(slot))
            for tensor in changed.gate
            if tensor.expert_axis >= 0
            for router in [changed.routers[tensor.router]]
            for slot in rows
            if slot in router.slots
        }
        self._change(changed, kept, data, gate)

    def _read_state(self, folder: Path) -> tuple[list[str], list[int]]:
        """Who sits in the slots of a state, and which slots have rows of their own."""
        engine = self._engine
        where = str(folder)
        try:
            state = files.parse_json(_read(folder / _STATE))
            names = [str(name) for name in state["slots"]]
            rows = [int(slot) for slot in state["rows"]]
            came = str(state["experts"])
            fits = (state["base"], state["layout"]) == (engine.manifest.base.digest, engine.manifest.layout.hex())
        except (ValueError, KeyError, TypeError):
            raise BundleError("damaged", where=str(folder / _STATE)) from None
        if not fits or len(names) != len(engine.manifest.slots) or not set(rows) <= set(range(len(names))):
            raise BundleError("the state of another bundle", where=where)
        if came != _experts_of(engine):
            mend = "Add this device's experts again, and save the state anew."
            raise BundleError("the bundle has other experts than when the state was saved", where=where, mend=mend)
        if not all(name == "" or manifests.valid_id(name) for name in names):
            raise BundleError("damaged", where=str(folder / _STATE))
        return names, rows


def _experts_of(engine: Engine) -> str:
    """SHA-256 (hex) of the experts that a bundle came with, and of those that the store adds to it."""
    came = next((file.sha256.hex() for file in engine.manifest.files if file.path == manifests.EXPERTS), "")
    return "+".join([came, *(f"{added.id}:{added.sha256}" for added in engine.kept)])


def _mend(bundle: str) -> str:
    return f"Add it from the repository: molehill edge add {bundle} EXPERT, or: molehill edge policy --experts any"


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
