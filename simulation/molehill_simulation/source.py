"""What was trained: a finished run, or an adapter folder, with its base."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molehill import config, files
from molehill.errors import AdapterError, ConfigError, DataError, ModelError
from molehill.molora.adapter import Manifest, describe_peft, load_adapter, load_peft, read_manifest
from molehill.molora.build import wrap
from molehill.molora.head import Head, Pooling
from molehill.molora.model import MoLoRAModel
from molehill.molora.peft_folder import is_peft
from molehill.molora.trial import trial_of
from molehill.tasks.base_model import BaseInfo, load_base
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.kind import kind_of, make_task
from molehill.tasks.weights import Stored
from molehill.wire.tree import Tree
from molehill_client.secret import KeyFile, Keyring, KeySource
from molehill_client.state import PersonalState, StateStore
from molehill_server.events import read
from molehill_simulation.text import natural

_log = logging.getLogger(__name__)

GLOBAL = "global"
AS = "--as"  # an option that says whose gate, and takes experts too
CLIENT = "client:"
_LONGEST = 512  # tokens of a labelled row, where no run says


@dataclass
class Source:
    """A trained adapter on its base, in float32.

    Attributes:
        name: Of the run or folder.
        adapter: Description of the adapter.
        base: Which base.
        stored: The base's files.
        limit: The longest input the base takes, in tokens.
        task: What the adapter does.
        model: Base and adapter.
        tokenizer: Of the base.
        run: The run's configuration; None for an adapter alone.
        out: The run folder; None for an adapter alone.
        state: Folder of a lab machine's personal state; None to look in the run folder.
        option: Of the command that says whose gate, for errors.
        made: What others made of it, to be used again.
    """

    name: str
    adapter: Manifest
    base: BaseInfo
    stored: Stored
    limit: int
    task: config.Task
    model: MoLoRAModel
    tokenizer: PreTrainedTokenizerBase
    run: config.Config | None
    out: Path | None
    state: Path | None
    option: str = "--gate"
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Any:
        """Configuration of the base, or of the language model in it."""
        base: Any = self.model.base
        return base.config.get_text_config()

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer of a causal LM: what was trained to, and what the base knows."""
        return sorted(CausalLM(self.tokenizer, self.task.max_length).ends(self.model.base))

    def template(self) -> str:
        """The chat template of the tokenizer; empty where it has none.

        Raises:
            ModelError: It has several, and none of them is the default.
        """
        try:
            return str(self.tokenizer.get_chat_template()) if self.tokenizer.chat_template else ""
        except ValueError as error:
            where = str(self.stored.folder)
            raise ModelError(f"which chat template to use is not clear: {error}", where=where) from None

    def client(self, gate: str) -> str | None:
        """Whose gate a name means; None for the one that all share.

        Args:
            gate: ``global``, a client, who it is in the data, or ``client:`` before either, for one called ``global``.

        Raises:
            DataError: The table of names is damaged.
        """
        if gate == GLOBAL:
            if GLOBAL in self.clients():
                _log.warning(
                    "%s global is what all share; the client of that name is %s%s", self.option, CLIENT, GLOBAL
                )
            return None
        name = unicodedata.normalize("NFC", gate.removeprefix(CLIENT))
        known = self.clients()
        path = None if self.out is None else self.out / "owners.json"
        if name not in known and path is not None and path.is_file():
            try:
                told = files.parse_json(path.read_bytes())
                found = [ours for ours, theirs in told.items() if unicodedata.normalize("NFC", theirs) == name]
            except (ValueError, TypeError, AttributeError):
                raise DataError("not a table of names", where=str(path), mend="Was the file edited?") from None
            name = found[0] if len(found) == 1 else name
        return name

    def clients(self) -> list[str]:
        """Those whose personal gates can be exported."""
        if self.state is not None:
            folder = self.state / "runs" / self.name
        elif self.out is not None:
            folder = self.out / "clients"
        else:
            return []
        return sorted((path.name for path in folder.glob("*") if any(path.glob("round-*.sealed"))), key=natural)

    @contextmanager
    def gate(self, name: str) -> Iterator[MoLoRAModel]:
        """The model with somebody's gate (and head).

        Args:
            name: As for `client`.

        Raises:
            ConfigError: There is no such client, or nothing that all share.
            ResumeError: The personal state cannot be read.
        """
        model = self.model
        before = model.flat.detach().clone()
        try:
            client = self.client(name)
            if client is None:
                self._share()
            else:
                state = self._state(client)
                model.load(state.personal)
                model.use_k(state.k)
                model.use_personal(gate=True, head=True)
            yield model
        finally:
            model.flat.data.copy_(before)
            model.use_k(None)

    def _share(self) -> None:
        model, kept = self.model, dict(self.adapter.personal)
        if self.run is not None:
            kept = {"gate": self.run.personal.gate, "head": self.run.personal.head}
        model.use_personal(gate=False, head=False)
        if kept.get("head") == "personal" and model.head is not None:
            raise ConfigError(
                "this run has no head that all share", where=f"{self.option} {GLOBAL}",
                mend=f"Give {self.option} {self._names()}.",
            )  # fmt: skip
        if kept.get("gate") == "personal" and model.routers:
            raise ConfigError(
                "this run has no gate that all share: every client keeps its router", where=f"{self.option} {GLOBAL}",
                mend=f"Give {self.option} {self._names()}.",
            )  # fmt: skip
        if kept.get("gate") in {"split", "mixture"}:  # the older name is in adapters of format 1
            model.load(Tree(model.layout.where(lambda key: key.own)))

    def replaced(self, gate: str) -> bool:
        """Whether somebody's model has other experts than the one that all share (``personal.candidates``).

        Args:
            gate: As for `client`.

        Raises:
            ConfigError: There is no such client.
            ResumeError: The personal state cannot be read.
        """
        client = self.client(gate)
        return client is not None and len(self._state(client).own.layout) > 0

    def k(self, gate: str) -> int | None:
        """Experts per token of somebody's model, where it has a number of its own (``federation.policy``).

        Args:
            gate: As for `client`.

        Raises:
            ConfigError: There is no such client.
            ResumeError: The personal state cannot be read.
        """
        client = self.client(gate)
        return None if client is None else self._state(client).k

    def _state(self, name: str) -> PersonalState:
        names = self.clients()
        if name not in names or self.run is None:
            known = ", ".join(names) or "none: a run folder holds those of a simulation, --state those of a lab"
            experts = self.model.experts
            more = f" Experts are {', '.join(experts)}." if self.option == AS and experts else ""
            mend = f"Known are {known}.{more}"
            raise ConfigError(f"there is no personal gate of {name!r}", where=self.option, mend=mend)
        if self.state is not None:
            folder, key = self.state / "runs" / self.name / name, _key_of(self.state)
        else:
            assert self.out is not None
            folder, key = self.out / "clients" / name, None
        store = StateStore(folder, self.run.run.name, self.base.digest, key)
        state = store.before(max(store.rounds()) + 1)
        # What was chosen may be the shared model as it is.
        if not len(state.personal.layout) and state.k is None and not state.chosen:
            mend = f"Give {self.option} {GLOBAL}."
            raise ConfigError(f"{name} keeps nothing personal in this run", where=self.option, mend=mend)
        return state

    def _names(self) -> str:
        return " or ".join(self.clients()[:3]) or "CLIENT, and --state of that client's machine"


def open_source(
    path: Path,
    base: str | None = None,
    state: Path | None = None,
    *,
    option: str = "--gate",
    streamed: Callable[[Any], bool] = lambda _: False,
) -> Source:
    """Open a run folder, an adapter folder, or a PEFT folder of a LoRA for a causal language model.

    Args:
        path: The folder.
        base: Where the base is, when it is not where the run had it.
        state: ``--state`` of a lab machine, for its personal gate.
        option: Of the command that says whose gate, for errors.
        streamed: Whether a causal LM with some configuration leaves its weights in their files: less memory, and slow
            to run.

    Raises:
        AdapterError: There is no adapter, it is damaged, or it belongs to another base.
        ConfigError: There is no such state.
        ModelError: The base cannot be loaded.
    """
    if state is not None and not state.is_dir():
        raise ConfigError("there is no such folder", where=f"--state {state}", mend="Name the --state of that lab.")
    run, out, folder = None, None, path
    if (path / "config.toml").is_file():
        run, out, folder = config.load(path / "config.toml"), path, path / "adapter"
        if not folder.is_dir():
            raise AdapterError(
                "this run has no adapter yet",
                where=str(path),
                mend=f"Finish it: molehill simulate --out {path} --resume",
            )
    alone = is_peft(folder) and not (folder / "molora.json").exists()
    adapter = describe_peft(folder) if alone else read_manifest(folder)
    where = base or (run.base.model if run is not None else adapter.base["id"])
    if not where or where.startswith("local:"):
        raise AdapterError(
            f"the base {where.removeprefix('local:')!r} was a folder" if where else "it does not name its base",
            where=str(folder),
            mend="Say where it is: --base DIR",
        )
    revision = run.base.revision if run is not None and base is None else adapter.base.get("revision") or None
    settings = config.Base(
        model=where, revision=None if where.startswith("sample:") else revision, precision="fp32", device="cpu"
    )
    known = {"labels": adapter.labels, "range": adapter.range}
    task = run.task.model_copy(update=known) if run is not None else _task(adapter)
    loaded = load_base(settings, task, streamed=streamed if kind_of(task).head is None else lambda _: False)
    made, head = make_task(task, loaded.tokenizer), None
    if made.outputs:
        pooling: Pooling = adapter.pooling  # type: ignore[assignment]  # as it was saved
        anchored = run is not None and run.personal.head_residual is not None
        head = Head(trial_of(loaded.model).width, made.outputs, pooling, anchored=anchored)
    gate = run.personal.gate if run is not None else "global"
    if run is None:
        task = task.model_copy(update={"max_length": min(loaded.limit, _LONGEST)})
    try:
        model = wrap(loaded.model, adapter.molora, gate=gate, head=head).eval()
    except ModelError as error:
        if not alone:
            raise
        raise AdapterError(f"it is for another base: {error.what}", where=str(folder), mend="Give --base.") from None
    if alone:
        load_peft(folder, model)
    else:
        older = partial(loaded.stored.digest, settings=False)
        load_adapter(folder, model, base_digest=loaded.info.digest, weights_digest=older)
    name = run.run.name if run is not None else path.resolve().name
    return Source(
        name, adapter, loaded.info, loaded.stored, loaded.limit, task, model, loaded.tokenizer, run, out, state,
        option,
    )  # fmt: skip


def finished(out: Path) -> tuple[int, int, float]:
    """When a run ended (seconds since 1970), its rounds, and the privacy it spent; zeros for what it does not say."""
    ended, rounds, epsilon = 0, 0, 0.0
    for event in read(out / "metrics.jsonl"):
        if event["event"] == "round":
            rounds = max(rounds, int(event["round"]))
            epsilon = max(epsilon, float(event["report"].get("epsilon", 0.0)))
        elif event["event"] == "end":
            ended = int(event["time"])
    return ended, rounds, epsilon


def _key_of(state: Path) -> KeySource:
    """Where the key of a lab machine's personal state is: its file, or the keyring of the operating system."""
    file = KeyFile(state / "state.key")
    if file.path.exists():
        return file
    ring = Keyring(str(state.resolve()))
    if ring.load() is None:
        raise ConfigError(
            "the key of the personal state is neither in state.key nor in the keyring", where=str(state),
            mend="Export on that lab's own machine and account, with the --state that it joins with.",
        )  # fmt: skip
    return ring


def _task(adapter: Manifest) -> config.Task:
    return config.Task(kind=adapter.task, labels=adapter.labels, range=adapter.range, max_length=16)
