"""What a run is on a lab machine: its base model, its exchange, what its owner agreed to, and the client they make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehill import address
from molehill.config import Config, parse
from molehill.errors import ConfigError
from molehill.pki import Identity, Signer
from molehill.tasks.adapted import open_model
from molehill.tasks.rows import Rows
from molehill.tasks.schema import columns_of
from molehill.wire.remote import GrpcExchange
from molehill_client import policy
from molehill_client.client import Client
from molehill_client.consent import Consent, agreement, digest_of, in_words
from molehill_client.deploy.introduction import Introduction
from molehill_client.deploy.outbox import Outbox
from molehill_client.deploy.post import Post
from molehill_client.secret import KeyFile, Keyring, KeySource
from molehill_client.state import StateStore
from molehill_client.workbench import Workbench

_log = logging.getLogger("molehill_client.trainer")  # of the process that it is part of


@dataclass(frozen=True)
class Opened:
    """A run on this machine.

    Attributes:
        client: Trains in it.
        remote: The coordinator's exchange.
        rows: SHA-256 (hex) of all rows.
        facts: What is told of it to whoever asks this machine.
    """

    client: Client
    remote: GrpcExchange
    rows: str
    facts: Mapping[str, Any]


def open_run(
    met: Introduction,
    post: Post,
    identity: Identity,
    word: policy.Word | None,
    rows: Callable[[Config], tuple[Rows, Rows]],
) -> Opened:
    """Open a run, if the owner agrees to it.

    Args:
        met: The run, as the coordinator introduced it.
        post: What the trainer was started with.
        identity: Of this machine.
        word: The owner's policy; None allows what the configuration says.
        rows: Reads those to train on and those that are held out, once the owner agrees to the configuration.

    Raises:
        ConfigError: The configuration cannot be used here.
        ConsentError: The owner does not agree.
        DataError: The rows cannot be used.
        ModelError: The base model cannot be used.
        ResumeError: The personal state cannot be used.
    """
    config = parse(tomllib.loads(met.config))
    consent = None if word is None else Consent(word)
    if consent is not None:
        consent.require_run(config, own_base=post.base is not None)
    config = config.model_copy(update={"base": config.base.model_copy(update=_changes(config, post))})
    train, test = rows(config)
    model, base, task, computed = open_model(config)
    initial = model.tree(lambda key: not key.residual)
    if consent is not None:
        consent.require_model(config, base.digest, model)
    state, run = Path(post.state), config.run.name
    there = post.exchange or address.join(post.server, met.exchange_port)
    remote = GrpcExchange(there, identity, state / "cache")
    with contextlib.ExitStack() as undo:
        undo.callback(remote.close)
        bench = Workbench(config, model, task, base.digest, initial, Outbox(remote, state / "outbox"))
        store = StateStore(run_folder(state, run) / post.name, run, base.digest, _key(post), met.instance)
        agreed = agreement(config, base.digest, model, columns_of(config.data, config.task, train.columns), word)
        _record(agreed, state)
        encoded = (task.encode(train), task.encode(test))
        client = Client(bench, post.name, *encoded, store, signer=Signer(identity), consent=consent)
        undo.pop_all()
    lengths = client.lengths
    of_rows = f"Tokens of the {len(lengths.tokens)} rows: {lengths.quantiles}"
    told = ". ".join(filter(None, (lengths.loss, of_rows, lengths.enough)))
    _log.info("%s", told)
    _log.info("Computed in %s: %s", computed.precision, computed.why)
    facts = {
        "run": run,
        "agreed": in_words(agreed),
        "base": base.digest,
        "n_train": len(train),
        "n_test": len(test),
        "lengths": told,
        "device": str(model.flat.device),
    }
    digest = hashlib.sha256(json.dumps([dict(each.columns) for each in (train, test)], default=str).encode())
    return Opened(client, remote, digest.hexdigest(), facts)


def run_folder(state: Path, run: str) -> Path:
    """What a machine keeps of one run."""
    return state / "runs" / run


def _changes(config: Config, post: Post) -> dict[str, Any]:
    """What this machine says of the base model."""
    changes: dict[str, Any] = {}
    if post.base is not None:
        changes |= {"model": post.base, "revision": None}
    elif _is_path(config.base.model):  # a coordinator has no business among the files of this machine
        raise ConfigError(
            "the run names its base model by a folder, which is not this machine's",
            where="base.model",
            mend="Join with --base FOLDER.",
        )
    if post.device is not None:
        changes["device"] = post.device
    return changes


def _is_path(model: str) -> bool:
    """Whether a base model is named by a place on a disk, and not by a sample or hub id."""
    return model.startswith(("/", ".", "~")) or "\\" in model or model.count("/") > 1 or Path(model).exists()


def _record(agreed: Mapping[str, Any], state: Path) -> None:
    """Note an agreement down for the owner, in the log and in ``agreed.jsonl``."""
    _log.info("%s", in_words(agreed))
    entry = {"time": time.time(), "digest": digest_of(agreed), **agreed}
    with (state / "agreed.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _key(post: Post) -> KeySource:
    return Keyring(str(Path(post.state))) if post.keyring else KeyFile(Path(post.state) / "state.key")
