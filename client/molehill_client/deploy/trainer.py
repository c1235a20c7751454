"""The trainer of a lab machine: one long-lived process with base model, rows and personal state.

    python -m molehill_client.deploy.trainer --socket PATH --name NAME --data FILE --identity DIR --state DIR

It answers the thin ClientApp over a Unix socket. What to train comes from the coordinator as a configuration, which is
data: it names a base model and methods that are installed here; no code is ever received.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import molehill
from molehill.config import Config, parse
from molehill.errors import DataError, MessageError
from molehill.plan import ClientPlan, Hello
from molehill.tasks.adapted import open_model
from molehill.tasks.rows import Rows
from molehill.tasks.schema import load_rows
from molehill.wire.exchange import connect
from molehill_client.client import Client
from molehill_client.deploy.line import Request, serve
from molehill_client.state import StateStore
from molehill_client.workbench import Workbench


class Introduction(BaseModel):
    """How the coordinator introduces a run.

    Attributes:
        config: The run's configuration, TOML; ``data.source`` is ignored.
        exchange_port: Port of the exchange on the coordinator's host.
        version: Version of Molehill there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    exchange_port: int = Field(ge=1, le=65535)
    version: str


class Trainer:
    """Everything behind the socket.

    Args:
        name: Name in this machine's certificate.
        server: Host of the coordinator.
        data: This owner's rows.
        test: Its held-out rows; when None, a part of ``data`` is held out.
        identity: Identity folder.
        state: Folder for what must survive a restart.
    """

    def __init__(self, name: str, server: str, data: str, test: str | None, identity: Path, state: Path) -> None:
        self._name, self._server, self._data, self._test = name, server, data, test
        self._identity, self._state = identity, state
        self._met: Introduction | None = None
        self._client: Client | None = None
        self._busy = ""
        memory = state / "introduction.json"
        if memory.exists():  # we were restarted in the middle of a run
            self._met = Introduction.model_validate_json(memory.read_text(encoding="utf-8"))

    def answer(self, request: Request) -> str:
        """Answer a request with JSON."""
        if request.kind == "query.hello":
            return self._hello(request.text).model_dump_json()
        if request.kind == "status":
            return json.dumps({"name": self._name, "base": self._base(), "run": self._run()})
        plan = _parsed(ClientPlan, request.text)
        client = self._ready()
        match request.kind:
            case "train":
                return client.train(plan).model_dump_json()
            case "train.baseline":
                return client.baseline(plan).model_dump_json()
            case "evaluate":
                return client.evaluate(plan).model_dump_json()
        raise MessageError(f"unknown request {request.kind!r}")

    def _hello(self, text: str) -> Hello:
        met = _parsed(Introduction, text)
        if met.version != molehill.__version__:
            raise MessageError(
                f"{self._name} runs Molehill {molehill.__version__}, the coordinator {met.version}",
                mend="Install the same version on both.",
            )
        if met != self._met or self._client is None:
            self._met, self._client = met, None
            client = self._ready()
            draft = self._state / ".introduction.json"
            draft.write_text(met.model_dump_json(), encoding="utf-8")
            draft.replace(self._state / "introduction.json")
        client = self._ready()
        return Hello(
            client=self._name,
            n_train=len(client.train_rows),
            n_test=len(client.test_rows),
            version=molehill.__version__,
        )

    def _ready(self) -> Client:
        if self._client is None:
            if self._met is None:
                raise MessageError("no run was introduced to this machine", mend="The coordinator says hello first.")
            self._client = self._open(self._met)
        return self._client

    def _open(self, met: Introduction) -> Client:
        config = parse(tomllib.loads(met.config))
        train, test = self._rows(config)
        model, base, task = open_model(config)
        initial = model.tree(lambda key: not key.residual)
        exchange = connect(f"grpc://{self._server}:{met.exchange_port}?identity={self._identity}")
        bench = Workbench(config, model, task, base.digest, initial, exchange)
        run = config.run.name
        store = StateStore(self._state / "runs" / run, run, base.digest)
        return Client(bench, self._name, task.encode(train), task.encode(test), store)

    def _rows(self, config: Config) -> tuple[Rows, Rows]:
        def read(source: str) -> Rows:
            return load_rows(config.data.model_copy(update={"source": source}), config.task)[0]

        rows = read(self._data)
        if self._test is not None:
            return rows, read(self._test)
        sides: dict[bool, list[int]] = {False: [], True: []}
        for i in range(len(rows)):
            sides[held_out(rows, i, config.data.test_fraction)].append(i)
        if not (sides[False] and sides[True]):
            raise DataError(
                f"{len(rows)} rows are too few to hold some out",
                where=self._data,
                mend="Give more rows, or a file of held-out rows with --test.",
            )
        return rows.take(sides[False]), rows.take(sides[True])

    def _base(self) -> str:
        return self._client.bench.base_digest if self._client else ""

    def _run(self) -> str:
        return self._client.bench.config.run.name if self._client else ""


def held_out(rows: Rows, i: int, fraction: float) -> bool:
    """Whether a row is held out, by a digest of its group or else of its values.

    Equal rows and rows of one group are on the same side, and a row keeps its side when the file grows.
    """
    columns = {"group"} if "group" in rows.columns else set(rows.columns)
    values = [rows.columns[name][i] for name in sorted(columns)]
    first = hashlib.sha256(json.dumps(values, default=str).encode()).digest()[:8]
    return int.from_bytes(first) < fraction * 2**64


def _parsed(kind: type[Any], text: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise MessageError(
            f"malformed {kind.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            mend="Run the same version of Molehill on server and clients.",
        ) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="The trainer of a lab machine.")
    for name in ("socket", "name", "server", "data", "identity", "state"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--test")
    given = parser.parse_args(arguments)
    path, state = Path(given.socket), Path(given.state)
    path.unlink(missing_ok=True)
    trainer = Trainer(given.name, given.server, given.data, given.test, Path(given.identity), state)
    with socket.socket(socket.AF_UNIX) as listener:
        os.umask(0o077)
        listener.bind(str(path))
        listener.listen()
        serve(listener, trainer.answer)


if __name__ == "__main__":
    main()
