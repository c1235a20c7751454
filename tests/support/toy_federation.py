"""A federation small enough to follow by hand: linear regression with two LoRA experts, in numpy.

The client keeps the contract of the real one: fetch blobs, add the personal state, train what the plan says, put the
delta. Its experts have fixed gates, so every gradient is two lines.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from molehill import __version__
from molehill.config import Config, parse
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Scores
from molehill.secure.messages import AskAgree, AskKeys, AskShares, AskUnmask
from molehill.secure.vector import Form
from molehill.wire.clipping import clip
from molehill.wire.exchange import Exchange, Place
from molehill.wire.keys import Key
from molehill.wire.message import Delta, Masked, decode_tree, encode_delta, encode_masked
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Tree
from molehill_client.masking import Masker

SITE = "layer.0.linear"
EXPERTS = ("e0", "e1")
BASE = "b" * 64
D_IN, D_OUT, RANK = 5, 4, 3
LR = 0.05
HEAD = Key("head", "-", "head.bias")
GATE = Key(SITE, "-", "gate.weight")

# Sections of runs in which owners lean on experts, or experts are dealt to owners.
LEANS = {"molora": {"scorer": "leaning"}, "federation": {"assign": "clusters"}}
LEASE = {"molora": {"scorer": "own_alias", "selector": "dense"}, "federation": {"preset": "fedlease"}}
REVERSE = {
    "molora": {"experts": 6, "shared": 1, "scorer": "lowrank_dot", "selector": "top_k"},
    "federation": {"preset": "fedamole"},
    "personal": {"gate": "split"},
}
ROUTER = {
    "molora": {"scorer": "nearest_centroid", "selector": {"name": "top_k", "k": 1}, "scope": "model"},
    "federation": {"preset": "fedrouter"},
    "personal": {"gate": "split"},
}


def config(**sections) -> Config:
    """Exact codecs, no baselines and no grace unless said otherwise."""
    values = {
        "run": {"rounds": 3, "seed": 7},
        "data": {"clients": 4},
        "train": {"steps": 2},
        "wire": {"up": "fp32", "down": "fp32"},
        "round": {"grace": 2.0, "deadline": 60.0},
        "evaluate": {"baselines": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse(values)


def killed_at(reply_number: int):
    """What a run may do with replies: be killed by the one of this number, from 1."""
    trained = []

    def pass_on(client, plan, reply):
        trained.append(client.name)
        if len(trained) == reply_number:
            raise KeyboardInterrupt
        return reply.model_dump_json()

    return pass_on


def initial() -> Tree:
    rng = np.random.default_rng(0)
    arrays = {HEAD: np.zeros(D_OUT, np.float32), GATE: rng.normal(size=(2, D_IN)).astype(np.float32)}
    for expert in EXPERTS:
        arrays[Key(SITE, expert, "A")] = rng.normal(size=(RANK, D_IN)).astype(np.float32)
        arrays[Key(SITE, expert, "B")] = np.zeros((D_OUT, RANK), np.float32)
    return Tree.of(arrays)


def write_initial(out: Path, base: str = BASE) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tree(out / "initial.safetensors", initial(), {"base": base})


def client_name(number: int) -> str:
    return f"client-{number}"


def data(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one client; each has its own target and number of rows."""
    rng = np.random.default_rng(100 + number)
    x = rng.normal(size=(10 + 5 * number, D_IN)).astype(np.float32)
    return x, (x @ rng.normal(size=(D_IN, D_OUT)) + number).astype(np.float32)


def steps(tree: dict[Key, np.ndarray], number: int, seed: int, count: int, trains) -> float:
    """Gradient steps in place on the tensors for which ``trains(key)``; returns the last loss."""
    x, y = data(number)
    rng = np.random.default_rng(seed)
    loss = 0.0
    for _ in range(count):
        rows = rng.choice(len(x), size=8, replace=False)
        xb, yb = x[rows], y[rows]
        product = sum(0.5 * tree[Key(SITE, e, "B")] @ tree[Key(SITE, e, "A")] for e in EXPERTS)
        error = (xb @ product.T + tree[HEAD] - yb) / len(rows)
        loss = float((error**2).sum() * len(rows))
        grads = {HEAD: error.sum(0), GATE: tree[GATE] - number}
        for e in EXPERTS:
            a, b = Key(SITE, e, "A"), Key(SITE, e, "B")
            grads[b] = 0.5 * error.T @ (xb @ tree[a].T)
            grads[a] = 0.5 * (error @ tree[b]).T @ xb
        for key, grad in grads.items():
            if trains(key):
                tree[key] = (tree[key] - LR * grad).astype(np.float32)
    return loss


class MemoryVault:
    """Keeps one secret."""

    data = None

    def load_secret(self):
        return self.data

    def save_secret(self, data):
        self.data = data


class ToyClient:
    """One data owner, following its plan to the letter."""

    def __init__(self, number: int, settings: Config, out: Path, exchange: Exchange) -> None:
        self.number, self.name = number, client_name(number)
        self.config, self.exchange = settings, exchange
        self.folder = out / "clients" / self.name
        self.held: set[str] = set()
        self.rows = len(data(number)[0])  # that it says it has
        self.masker = Masker(self.name, settings, MemoryVault())

    def hello(self) -> dict:
        return {"client": self.name, "n_train": self.rows, "n_test": 3, "version": __version__}

    def receive(self, plan: ClientPlan) -> tuple[dict[Key, np.ndarray], int]:
        """Values of all tensors, cut to the plan's rank; and the bytes that were new."""
        tree, fetched = {}, 0
        for digest in plan.blobs.values():
            blob = self.exchange.get(digest)
            fetched += 0 if digest in self.held else len(blob)
            self.held.add(digest)
            for key, value in decode_tree(blob, 2**24).items():
                if key.kind == "patch":
                    continue
                cut = {"A": value[: plan.rank], "B": value[:, : plan.rank] if value.ndim == 2 else value}
                tree[key] = cut.get(key.role, value).copy()
        before = [path for path in sorted(self.folder.glob("*.safetensors")) if int(path.stem) < plan.round]
        if before:
            tree |= {key: value.copy() for key, value in load_tree(before[-1])[0].items()}
        return tree, fetched

    def train(self, plan: ClientPlan) -> ClientReply:
        assert plan.client == self.name
        assert plan.base == BASE
        began = time.perf_counter()
        tree, fetched = self.receive(plan)
        before = dict(tree)
        loss = steps(tree, self.number, plan.seed, plan.steps, lambda key: plan.scope(key) != "frozen")
        self.folder.mkdir(parents=True, exist_ok=True)
        personal = Tree.of({key: value for key, value in tree.items() if plan.scope(key) == "personal"})
        save_tree(self.folder / f"{plan.round:05d}.safetensors", personal)
        changes = {key: tree[key] - before[key] for key in tree if plan.scope(key) == "shared"}
        rows, seen = self.rows, len(data(self.number)[0])
        tokens = {(SITE, "e0"): 2.0 * seen, (SITE, "e1"): 1.0 * seen}
        change = Tree.of(changes) if plan.clip is None else clip(Tree.of(changes), plan.clip)
        masked = self.config.privacy.secure_aggregation
        if masked:
            blob = self.mask(plan, change, rows, tokens, loss)
        else:
            blob = encode_delta(Delta(plan.run, plan.round, self.name, plan.base, change, rows, tokens), plan.codec)
        return ClientReply(
            client=self.name,
            round=plan.round,
            delta=self.exchange.put(blob, Place(plan.run, plan.round)),
            bytes_up=len(blob),
            bytes_down=fetched,
            examples=rows,
            loss=None if masked else loss,
            seconds=time.perf_counter() - began,
        )

    def mask(self, plan: ClientPlan, change: Tree, rows: int, tokens, loss: float) -> bytes:
        company = plan.company
        form = Form(change.layout, 1)
        values = form.fill(change, self.masker.weight(rows, company), tokens if plan.clip is None else None, [loss])
        numbers = self.masker.mask(plan.round, company, values)
        return encode_masked(
            Masked(plan.run, plan.round, company.attempt, self.name, plan.base, change.layout.digest, numbers)
        )

    def query(self, kind: str, text: str) -> str:
        """Answer a question of secure aggregation."""
        ask, answer = {
            "query.keys": (AskKeys, self.masker.keys),
            "query.shares": (AskShares, self.masker.shares),
            "query.agree": (AskAgree, self.masker.agree),
            "query.unmask": (AskUnmask, self.masker.unmask),
        }[kind]
        return answer(ask.model_validate_json(text)).model_dump_json()

    def evaluate(self, plan: ClientPlan) -> EvaluationReply:
        tree, _ = self.receive(plan.model_copy(update={"round": plan.round + 1, "rank": None}))
        return self._scores(tree, "global", "personalised")

    def baseline(self, plan: ClientPlan) -> EvaluationReply:
        del plan
        tree = dict(initial())
        steps(tree, self.number, 0, self.config.run.rounds * self.config.train.steps, lambda _: True)
        return self._scores(tree, "base", "local")

    def _scores(self, tree: dict[Key, np.ndarray], *stages: str) -> EvaluationReply:
        loss = steps(dict(tree), self.number, 0, 1, lambda _: False)
        scores = Scores(n=3, accuracy=1 / (1 + loss), loss=loss)
        return EvaluationReply(
            client=self.name,
            n_train=len(data(self.number)[0]),
            n_test=3,
            stages=dict.fromkeys(stages, scores),
            seconds=0,
        )
