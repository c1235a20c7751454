"""What goes wrong in a simulation: clients that cannot be reached, vanish, are late, or send garbage or poison.

All of it is decided by the run's seed, the round, the attempt and the client's id, so a run and its repetition, or its
continuation after a kill, meet the same misfortunes. It happens in the client, so every engine has it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from molehill import registry
from molehill.config import Config, MethodRef
from molehill.plan import ClientReply
from molehill.wire.connect import connect
from molehill.wire.keys import Key
from molehill.wire.message import decode_delta, encode_delta
from molehill.wire.tree import Tree
from molehill_protos.v1 import delta_pb2
from molehill_simulation.flower import ClientApp, ConfigRecord, Context, Message, RecordDict, lost_reply
from molehill_simulation.stage import NoReply, call

_AFTER = ("query.agree", "query.unmask")  # what is asked once the sum is there


class Fate(NamedTuple):
    """What happens to one client in one attempt of a round.

    Attributes:
        reachable: It gets the message.
        finishes: It lives to answer.
        delay: Seconds its answer is late.
    """

    reachable: bool
    finishes: bool
    delay: float


def fate(config: Config, group: str, client: str) -> Fate:
    """Draw a client's fate.

    Args:
        config: The run.
        group: Round and attempt, as in the message's group id.
        client: Any name of the client that does not change.

    Returns:
        Its fate.
    """

    def draw(what: str) -> float:
        text = f"{config.run.seed}/{group}/{client}/{what}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64

    scenario = config.scenario
    return Fate(
        reachable=draw("reach") < scenario.availability,
        finishes=draw("finish") >= scenario.dropout,
        delay=scenario.delay if draw("late") < scenario.stragglers else 0.0,
    )


class ScenarioApp(ClientApp):
    """A ClientApp with the misfortunes of the configuration.

    Args:
        app: The ClientApp.
        config: The run.
        late: Lets a client be late by some seconds.
    """

    def __init__(self, app: ClientApp, config: Config, late: Callable[[float], None]) -> None:
        super().__init__()
        self._app = app
        self._config = config
        self._late = late

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the ClientApp, unless fate is against it (`NoReply`); only rounds are affected."""
        outcome = next(self.together([message], [context]))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message | Exception]:
        """The same for several clients, which the ClientApp may serve at once; all messages are of one type."""
        kind = messages[0].metadata.message_type
        if kind not in ("train", "query.keys", *_AFTER):
            yield from call(self._app, messages, contexts)
            return
        fates = [
            fate(self._config, message.metadata.group_id, str(context.node_config["partition-id"]))
            for message, context in zip(messages, contexts, strict=True)
        ]
        reached = [i for i, fortune in enumerate(fates) if fortune.reachable]
        outcomes = call(self._app, [messages[i] for i in reached], [contexts[i] for i in reached])
        for message, context, fortune in zip(messages, contexts, fates, strict=True):
            if not fortune.reachable:
                yield NoReply("not reachable")
                continue
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                yield outcome
            elif kind == "train":
                yield self._afterwards(message, context, fortune, outcome)
            else:  # keys have the same fate as the training that follows; a client is first missed there
                yield NoReply("vanished") if kind in _AFTER and not fortune.finishes else outcome

    def _afterwards(self, message: Message, context: Context, fortune: Fate, reply: Message) -> Message | NoReply:
        """What becomes of a client's reply."""
        said = ClientReply.model_validate_json(str(reply.content["reply"]["json"]))
        if said.unusable:
            return reply
        exchange = connect(str(context.run_config["exchange"]))
        if not fortune.finishes:
            exchange.drop(said.delta)
            return NoReply("vanished")
        scenario, wire = self._config.scenario, self._config.wire
        if said.client in scenario.garbage or said.client in scenario.poison:
            blob = exchange.get(said.delta)
            if said.client in scenario.poison:
                blob = poison(blob, scenario.poison[said.client], wire.up, wire.max_bytes)
            if said.client in scenario.garbage:
                blob = spoil(blob, scenario.garbage[said.client], wire.up, wire.max_bytes)
            exchange.drop(said.delta)
            said = said.model_copy(update={"delta": exchange.put(blob), "bytes_up": len(blob)})
            reply = Message(RecordDict({"reply": ConfigRecord({"json": said.model_dump_json()})}), reply_to=message)
        if fortune.delay:
            self._late(fortune.delay)
        return reply


class Reported(ClientApp):
    """For engines that answer every message: of a client that vanished they say so, as Flower does of a lost node.

    Args:
        app: The ClientApp, which raises `NoReply`.
    """

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the ClientApp."""
        try:
            return self._app(message, context)
        except NoReply as fate:
            return lost_reply(str(fate), message)


def spoil(blob: bytes, kind: str, codec: MethodRef, max_bytes: int) -> bytes:
    """Make garbage of an encoded delta.

    Args:
        blob: The delta.
        kind: ``nan`` (values that are not numbers), ``shape`` (one row too many), ``huge`` (1e6 everywhere), ``keys``
            (a tensor nobody asked for; for a delta without values also in place of the former three) or ``bytes`` (cut
            short).
        codec: How the delta is encoded; NaN comes in the one that holds numbers as they are.
        max_bytes: Largest delta.

    Returns:
        Bytes that are well-formed up to the one thing that is wrong.
    """
    if kind == "bytes":
        return blob[: len(blob) // 2]
    delta = decode_delta(blob, max_bytes)
    arrays = dict(delta.tree)
    if not arrays:  # where nothing is shared there is no value to spoil
        kind = "keys"
    if kind == "nan":
        return _forge_nan(encode_delta(replace(delta, tree=Tree(delta.tree.layout)), _raw()))
    if kind == "huge":
        arrays = {key: np.full_like(value, 1e6) for key, value in arrays.items()}
    elif kind == "shape":
        key = next(iter(arrays))
        arrays[key] = np.concatenate([arrays[key], arrays[key][:1]])
    else:
        arrays[Key("foreign.site", "e0", "A")] = np.zeros((1, 1), np.float32)
    return encode_delta(replace(delta, tree=Tree.of(arrays)), codec)


def poison(blob: bytes, factor: float, codec: MethodRef, max_bytes: int) -> bytes:
    """Multiply an encoded delta; nothing but the model shows that it is wrong.

    Args:
        blob: The delta.
        factor: What all of its values are multiplied by.
        codec: How the delta is encoded.
        max_bytes: Largest delta.

    Returns:
        The delta, encoded again.
    """
    delta = decode_delta(blob, max_bytes)
    return encode_delta(replace(delta, tree=Tree(delta.tree.layout, np.float32(factor) * delta.tree.flat)), codec)


@functools.cache
def _raw() -> MethodRef:
    """The codec whose payload is the numbers as they are, so that any can be put there."""
    one = Tree.of({Key("site", "e0", "A"): np.ones((1, 1), np.float32)})
    exact = [method.name for method in registry.methods("codec") if registry.declared(method, "exact")]
    return MethodRef(name=next(n for n in exact if registry.build("codec", n).encode(one) == one.flat.tobytes()))


def _forge_nan(blob: bytes) -> bytes:
    """Fill such a delta with NaN, which no honest encoder does, and make its checksum right again."""
    message = delta_pb2.Delta.FromString(blob)
    tree = message.tree
    tree.payload = b"\x00\x00\xc0\x7f" * (len(tree.payload) // 4)
    total = hashlib.sha256()
    for part in (tree.codec.encode(), tree.params.encode(), tree.tensors, tree.payload):
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    tree.sha256 = total.digest()
    return message.SerializeToString(deterministic=True)
