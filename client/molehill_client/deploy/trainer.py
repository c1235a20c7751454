"""The trainer of a lab machine: one long-lived process with base model, rows and personal state.

It answers the thin ClientApp over a Unix socket. What to train comes from the coordinator as a configuration, which is
data: it names a base model and methods that are installed here; no code is ever received.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

import molehill
from molehill import files, logs
from molehill.config import Config
from molehill.errors import (
    ConfigError,
    ConsentError,
    DataError,
    DeployError,
    IdentityError,
    MessageError,
    ModelError,
    MolehillError,
    ResumeError,
    TrainingError,
)
from molehill.evidence import Moment
from molehill.pki import Identity, read_passphrase
from molehill.plan import ClientPlan, ClientReply, Hello
from molehill.secure.messages import AskAgree, AskKeys, AskShares, AskUnmask
from molehill.tasks.rows import Rows
from molehill.tasks.schema import load_rows
from molehill.wire.exchange import Place
from molehill.wire.remote import GrpcExchange
from molehill.words import counted
from molehill_client import policy
from molehill_client.client import Client
from molehill_client.deploy.introduction import Introduction
from molehill_client.deploy.line import Request, serve
from molehill_client.deploy.opening import open_run, run_folder
from molehill_client.deploy.outbox import Outbox
from molehill_client.deploy.post import Post
from molehill_client.deploy.sides import sides
from molehill_client.masking import Masker

_log = logging.getLogger("molehill_client.trainer")  # whatever the module is called when it is run


_LINES = 64  # kept for whoever watches; more than rounds between two looks

_UNUSABLE = {
    DataError: "its rows cannot be used",
    ModelError: "its base model cannot be used",
    ResumeError: "its personal state cannot be used",
    IdentityError: "its identity cannot be used",
}


class Trainer:
    """Everything behind the socket.

    Args:
        post: What it is started with.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._state = Path(post.state)
        for folder in ("runs", "outbox"):  # a trainer that was killed wrote there
            files.sweep(self._state / folder)
        passphrase = read_passphrase(Path(post.passphrase_file) if post.passphrase_file else None)
        self._identity = Identity.load(Path(post.identity), passphrase=passphrase)
        self._met: Introduction | None = None
        self._client: Client | None = None
        self._remote: GrpcExchange | None = None
        self._rows_digest = ""
        self._word: policy.Word | None = None
        self._status: dict[str, Any] = {
            "name": post.name,
            "pid": os.getpid(),
            "doing": "waiting for a run",
            "since": time.time(),
        }
        self._lines: deque[dict[str, Any]] = deque(maxlen=_LINES)
        memory = self._state / "introduction.json"
        if memory.exists():  # we were restarted in the middle of a run
            with contextlib.suppress(ValidationError, OSError):  # damaged or of another version: there will be a hello
                met = Introduction.model_validate_json(memory.read_bytes())
                self._met = met if met.version == molehill.__version__ else None

    def status(self, _: Request) -> str:
        """What this machine is doing, as JSON."""
        return json.dumps(self._status)

    def answer(self, request: Request) -> str:
        """Answer a request with JSON.

        Raises:
            MolehillError: In words that may leave this machine; the whole story is in the log and in `status`.
        """
        began = time.monotonic()
        try:
            with files.told("the trainer", self._state):
                answer = self._answer(request)
        except MolehillError as error:
            self._note(f"failed: {request.kind}", error=str(error))
            raise error if request.kind == "score" else self._told(error) from None
        except Exception as error:  # noqa: BLE001 - the server must hear of it, and the next round may go well
            _log.exception("%s failed", request.kind)
            self._note(f"failed: {request.kind}", error=f"{type(error).__name__}: {error}")
            raise MolehillError(
                f"{request.kind} failed with {type(error).__name__}", where=self._post.name, mend="See its trainer.log."
            ) from None
        self._note("waiting", error=None, limit=None)
        _log.info("%s took %.1f s", request.kind, time.monotonic() - began)
        return answer

    def _told(self, error: MolehillError) -> MolehillError:
        """What the coordinator is told: neither rows nor paths of this machine."""
        if isinstance(error, ConfigError | ConsentError | MessageError | TrainingError):
            return MolehillError(error.what, where=self._post.name, mend=error.mend)
        what = next((what for kind, what in _UNUSABLE.items() if isinstance(error, kind)), "it cannot go on")
        return MolehillError(what, where=self._post.name, mend="There, `molehill client status` says why.")

    def _answer(self, request: Request) -> str:
        if request.kind == "query.hello":
            self._note("getting ready")
            return self._hello(request.text).model_dump_json()
        if request.kind == "score":
            return self._score(request.text)
        client = self._ready()
        if request.kind.startswith("query."):
            return _masking(client.masker, request).model_dump_json()
        plan = _parsed(ClientPlan, request.text)
        # Well past the round's deadline nobody waits for the answer any more.
        limit = 2 * client.bench.config.round.deadline + 60
        self._note(request.kind, run=plan.run, round=plan.round, limit=limit)
        match request.kind:
            case "train":
                return self._train(client, plan, request.text)
            case "train.baseline":
                self._require_told(client, "train.baseline")
                return client.baseline(plan).model_dump_json()
            case "evaluate":  # also where no score may be told: the personal parts are fitted to the final model
                answer = client.evaluate(plan).model_dump_json()
                files.write(self._folder(plan.run) / "evaluate.json", request.text.encode())
                self._require_told(client, "evaluate")
                return answer
        raise MessageError(f"unknown request {request.kind!r}")

    @staticmethod
    def _require_told(client: Client, moment: Moment) -> None:
        if client.consent is not None:
            client.consent.require_told(client.bench.config, moment)

    def _train(self, client: Client, plan: ClientPlan, text: str) -> str:
        outbox = client.bench.exchange
        assert isinstance(outbox, Outbox)
        assert self._met is not None
        question = f"{text}\n{self._rows_digest}\n{self._met.model_dump_json()}"
        done = outbox.recall(question)
        if done is not None:
            text = f"{plan.run}: round {plan.round} was trained before, and the same delta was sent again"
            self._tell(text, run=plan.run, round=plan.round)
            return done
        reply = client.train(plan)
        answer = reply.model_dump_json()
        if reply.delta:
            outbox.remember(question, Place(plan.run, plan.round), reply.delta, answer)
        self._tell(_trained(plan, reply), run=plan.run, round=plan.round, loss=reply.loss, bytes_up=reply.bytes_up)
        return answer

    def _score(self, file: str) -> str:
        """Score the last model that was evaluated, on the held-out rows or on those of a file."""
        client = self._ready()
        try:
            plan = _parsed(ClientPlan, (self._folder(client.bench.config.run.name) / "evaluate.json").read_text())
        except FileNotFoundError:
            raise DeployError(
                "there is no final model yet", where=self._post.name, mend="It comes at the end of a run."
            ) from None
        own = client.test_rows
        if file:
            rows = self._read(client.bench.config, file)
            client.test_rows = client.bench.task.encode(rows)
        try:
            return client.evaluate(plan).model_dump_json()
        finally:
            client.test_rows = own

    def _hello(self, text: str) -> Hello:
        met = _parsed(Introduction, text)
        if met.version != molehill.__version__:
            raise MessageError(
                f"{self._post.name} runs Molehill {molehill.__version__}, the coordinator {met.version}",
                mend="Install the same version on both.",
            )
        word = self._read_policy()
        if met != self._met or word != self._word or self._client is None:
            self._met, self._word, self._client = met, word, None
            self._ready()
            files.write(self._state / "introduction.json", met.model_dump_json().encode())
        client = self._ready()
        return client.hello()

    def _ready(self) -> Client:
        if self._client is None:
            if self._met is None:
                raise MessageError("no run was introduced to this machine", mend="The coordinator says hello first.")
            self._word = self._read_policy()
            if self._remote is not None:
                self._remote.close()
                self._remote = None
            opened = open_run(self._met, self._post, self._identity, self._word, self._rows)
            self._client, self._remote, self._rows_digest = opened.client, opened.remote, opened.rows
            self._note(str(self._status["doing"]), **opened.facts)
        return self._client

    def _read_policy(self) -> policy.Word | None:
        """The owner's policy as it is now; a file that was damaged meanwhile allows nothing."""
        if self._post.policy is None:
            return None
        try:
            return policy.read(Path(self._post.policy))
        except ConfigError as error:
            self._client = None
            _log.error("%s", error)
            raise ConsentError("its owner's policy cannot be read", where=error.where, mend="Ask the owner.") from error

    def _folder(self, run: str) -> Path:
        return run_folder(self._state, run)

    def _read(self, config: Config, source: str) -> Rows:
        only = None if self._word is None else self._word.policy.data.columns
        return load_rows(config.data.model_copy(update={"source": source}), config.task, only=only)[0]

    def _rows(self, config: Config) -> tuple[Rows, Rows]:
        rows = self._read(config, self._post.data)
        held_out = None if self._post.test is None else self._read(config, self._post.test)
        train, test = sides(rows, held_out, config)
        return _first(train, config.data.rows), _first(test, config.data.test_rows)

    def _tell(self, text: str, **facts: Any) -> None:
        """Keep a line for whoever watches this machine, and log it."""
        _log.info("%s", text, extra=logs.fields(**facts))
        self._lines.append({"id": f"{os.getpid()}-{time.monotonic_ns()}", "text": text, "facts": facts})
        self._status = {**self._status, "lines": list(self._lines)}

    def _note(self, doing: str, **facts: Any) -> None:
        self._status = {**self._status, **facts, "doing": doing, "since": time.time()}


def _trained(plan: ClientPlan, reply: ClientReply) -> str:
    """One line about a round."""
    if reply.unusable:
        return f"{plan.run}: round {plan.round} was not trained, and no delta sent: {reply.unusable}"
    loss = "loss in the sum only" if reply.loss is None else f"loss {reply.loss:.4f}"
    traffic = f"sent {reply.bytes_up / 1e3:,.1f} kB, received {reply.bytes_down / 1e3:,.1f} kB"
    work = f"{counted(plan.steps, 'step')} on {counted(reply.examples, 'row')} in {reply.seconds:.1f} s"
    known = f"round {plan.accepted}" if plan.accepted else "none yet"
    return f"{plan.run}: round {plan.round} trained, {work}, {loss}, {traffic}; last accepted: {known}"


def _first(rows: Rows, count: int | None) -> Rows:
    return rows if count is None else rows.take(range(min(count, len(rows))))


def _masking(masker: Masker, request: Request) -> BaseModel:
    match request.kind:
        case "query.keys":
            return masker.keys(_parsed(AskKeys, request.text))
        case "query.shares":
            return masker.shares(_parsed(AskShares, request.text))
        case "query.agree":
            return masker.agree(_parsed(AskAgree, request.text))
        case "query.unmask":
            return masker.unmask(_parsed(AskUnmask, request.text))
    raise MessageError(f"unknown request {request.kind!r}")


def _parsed(kind: type[Any], text: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise MessageError(
            f"malformed {kind.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            mend="Run the same version of Molehill on server and clients.",
        ) from None


def main(text: str) -> None:
    """Serve until killed.

    Args:
        text: A `Post` as JSON.
    """
    logs.begin()
    os.umask(0o077)  # whatever is written here is the owner's own
    post = Post(**json.loads(text))
    for number in range(torch.cuda.device_count()):  # whichever is used
        torch.cuda.set_per_process_memory_fraction(post.gpu_memory, number)
    path = Path(post.socket)
    path.unlink(missing_ok=True)
    try:
        trainer = Trainer(post)
    except MolehillError as error:
        sys.exit(f"error: {error}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        serve(listener, trainer.answer, trainer.status)


if __name__ == "__main__":
    main(sys.argv[1])
