"""A small model, clients for it, and a dense numpy reference of every aggregation, written plainly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from molehill import registry
from molehill.config import Federation
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.records import Global, LowRank, Update

SITES = {"layer.0.query": (12, 10), "layer.0.ffn": (9, 14)}  # d_out, d_in
EXPERTS = ("e0", "e1", "shared0")
RANK = 3


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed=0, rank=RANK, patched=True):
    rng = np.random.default_rng([seed, 1])
    arrays = {
        Key("head", "-", "head.weight"): rng.normal(size=(3, 12)),
        Key("head", "-", "head.bias"): rng.normal(size=3),
    }
    for site, (d_out, d_in) in SITES.items():
        arrays[Key(site, "-", "gate.weight")] = rng.normal(size=(2, d_in))
        for expert in EXPERTS:
            arrays[Key(site, expert, "A")] = rng.normal(size=(rank, d_in))
            arrays[Key(site, expert, "B")] = rng.normal(size=(d_out, rank))
    patches = {}
    if patched:
        d_out, d_in = SITES["layer.0.query"]
        factors = rng.normal(size=(d_out, 2)).astype(np.float32), rng.normal(size=(2, d_in)).astype(np.float32)
        patches["layer.0.query", "e0"] = LowRank(*factors)
    return Global(Tree.of(arrays), patches, round=2)


def client(glob, seed, *, examples=None, tokens=True, rank=None, roles=("A", "B", "gate", "head"), far=1.0):
    """A client whose shared tensors moved by noise of size ``far``; ``roles`` are the kinds it sends."""
    rng = np.random.default_rng([seed, 2])
    arrays = {}
    for key, old in glob.tree.items():
        new = old + far * rng.normal(size=old.shape).astype(np.float32)
        if key.kind not in roles:
            continue
        if rank is not None and key.role == "A":
            new = new[:rank]
        if rank is not None and key.role == "B":
            new = new[:, :rank]
        arrays[key] = new
    routed = {(site, e): float(rng.uniform(1, 100)) for site in SITES for e in ("e0", "e1")} if tokens else {}
    return Update(f"c{seed}", Tree.of(arrays), examples or int(rng.integers(5, 400)), routed)


class Dense:
    """The reference: dictionaries, dense products, one formula a method."""

    @staticmethod
    def weight(update, key):
        if key.expert in {"-", "shared0"}:
            return update.examples
        here = {e: t for (site, e), t in update.tokens.items() if site == key.site}
        return update.examples * (here.get(key.expert, 0.0) / sum(here.values()) if sum(here.values()) else 1.0)

    @staticmethod
    def padded(value, shape):
        out = np.zeros(shape)
        out[tuple(slice(n) for n in value.shape)] = value
        return out

    @classmethod
    def mean(cls, glob, updates, weight=None):
        """Weighted mean of every tensor."""
        weight = weight or cls.weight
        out = {}
        for key, old in glob.tree.items():
            sent = [u for u in updates if key in u.tree and weight(u, key) > 0]
            total = sum(weight(u, key) for u in sent)
            values = [weight(u, key) / total * cls.padded(u.tree[key], old.shape) for u in sent]
            out[key] = sum(values) if sent else old
        return out

    @classmethod
    def products(cls, glob, updates, weight=None):
        """Weighted mean of B A by pair."""
        weight = weight or cls.weight
        out = {}
        for site in SITES:
            for expert in EXPERTS:
                a, b = Key(site, expert, "A"), Key(site, expert, "B")
                sent = [u for u in updates if (a in u.tree or b in u.tree) and weight(u, a) > 0]
                total = sum(weight(u, a) for u in sent)
                if sent:
                    out[site, expert] = sum(weight(u, a) / total * cls.product(u.tree, glob.tree, a, b) for u in sent)
        return out

    @classmethod
    def product(cls, tree, old, a, b):
        factors = [np.asarray(tree[key] if key in tree else old[key], np.float64) for key in (b, a)]
        rank = min(factors[0].shape[1], factors[1].shape[0])
        return factors[0][:, :rank] @ factors[1][:rank]

    @staticmethod
    def effective(glob):
        """What every expert adds to its frozen weight: B A + patch, as a dense matrix."""
        out = {}
        for site in SITES:
            for expert in EXPERTS:
                matrix = glob.tree[Key(site, expert, "B")].astype(np.float64) @ glob.tree[Key(site, expert, "A")]
                patch = glob.patches.get((site, expert))
                out[site, expert] = matrix if patch is None else matrix + patch.B.astype(np.float64) @ patch.A
        return out

    @staticmethod
    def patch(glob, pair):
        patch = glob.patches.get(pair)
        d = SITES[pair[0]]
        return np.zeros(d) if patch is None else patch.B.astype(np.float64) @ patch.A


def preset(name, seed=0, **keys):
    values = {**registry.build("federation", name), **keys}
    return Aggregator.from_config(Federation.model_validate(values), seed)


SENT = {  # what clients send under each preset's policy
    "ffa": ("B", "gate", "head"),
    "fedsvd": ("B", "gate", "head"),
    "fedsa": ("A", "gate"),
    "rolora": ("B", "gate", "head"),
    "fedpeft": ("gate", "head"),
    "local": (),
}
EVERYTHING = ("A", "B", "gate", "head")


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        model=model, client=client, dense=Dense, preset=preset, sites=SITES, experts=EXPERTS,
        sent=lambda name: SENT.get(name, EVERYTHING),
    )  # fmt: skip
