"""Clients of one process, on the tiny federation's model and rows, and whoever writes their plans."""

from __future__ import annotations

import tiny_world

from molehill.config import MethodRef
from molehill.plan import ClientPlan
from molehill.wire.local import MemoryExchange
from molehill.wire.message import decode_delta, encode_tree
from molehill_client.client import Client
from molehill_client.state import StateStore
from molehill_client.workbench import Workbench
from molehill_simulation.world import open_world

FP32 = MethodRef(name="fp32")
EXPERTS = (("*/A", "shared"), ("*/B", "shared"))
HEAD = (("*/head.residual*", "personal"), ("*/head*", "shared"))
PRIVATE = {"noise": 4.0, "epsilon": 50.0, "delta": 1e-5}
SITE = "encoder.layer.0.attention.self.query"
ANCHORED = (*EXPERTS, ("*/gate.residual*", "personal"), ("*/gate*", "shared"), *HEAD)


class House:
    """Clients of one process, and whoever writes their plans."""

    def __init__(self, sources, folder, **sections):
        wire = {"up": "fp32", "down": "fp32"} | sections.pop("wire", {})
        self.config = tiny_world.config(*sources, wire=wire, **sections)
        self.world = open_world(self.config)
        self.exchange = MemoryExchange()
        model = self.world.model
        initial = model.tree(lambda key: ".residual" not in key.role)
        self.bench = Workbench(
            self.world.config, model, self.world.task, self.world.base.digest, initial, self.exchange
        )
        self.folder = folder

    def client(self, number: int) -> Client:
        owner = self.world.owners[number]
        encode = self.world.task.encode
        store = StateStore(self.folder / owner.name, "tiny", self.bench.base_digest)
        return Client(self.bench, owner.name, encode(owner.train), encode(owner.test), store)

    def plan(self, number: int, round_: int = 1, tree=None, patches=(), **values) -> ClientPlan:
        trees = {"all": self.bench.initial if tree is None else tree}
        trees |= {f"patch.{i}": patch for i, patch in enumerate(patches)}
        given = {
            "run": "tiny",
            "round": round_,
            "client": self.world.owners[number].name,
            "base": self.bench.base_digest,
            "layout": self.bench.initial.layout.digest,
            "blobs": {name: self.exchange.put(encode_tree(each, FP32)) for name, each in trees.items()},
            "scopes": ANCHORED,
            "steps": self.config.train.steps,
            "seed": 5,
            "accepted": max(round_ - 1, 0),
            "codec": self.config.wire.up,
        }
        plan = ClientPlan.model_validate({**given, **values})
        self._allow(plan)
        return plan

    def _allow(self, plan: ClientPlan) -> None:
        """Have the configuration go as far as a plan, as one server writes both; what is changed later it refuses."""
        config = self.bench.config
        parts = {
            "run": config.run.model_copy(update={"rounds": max(config.run.rounds, plan.round)}),
            "train": config.train.model_copy(update={"steps": max(config.train.steps, plan.steps)}),
            "wire": config.wire.model_copy(update={"up": plan.codec}),
        }
        object.__setattr__(self.bench, "config", config.model_copy(update=parts))

    def delta(self, reply):
        return decode_delta(self.exchange.get(reply.delta), 2**24)
