"""What is personal, and what a client read, is in no byte that leaves it: everything sent is kept and searched."""

from __future__ import annotations

import json
from itertools import count

import numpy as np
import pytest
import tiny_world

from molehill.errors import FederationError
from molehill.plan import ClientPlan
from molehill.wire import connect, local
from molehill.wire.message import decode_delta
from molehill_client.client import Client
from molehill_server.app import app as server_app
from molehill_simulation import simulate as simulation
from molehill_simulation.engine import _run_config
from molehill_simulation.flower import SERVER_NODE, context_of
from molehill_simulation.grid import LocalGrid
from molehill_simulation.world import open_world

EXACT = {"up": "fp32", "down": "fp32"}
PLAIN = {"preset": "lora", "rank": 2, "targets": ["query", "intermediate.dense"]}
CASES = {
    f"{gate} gate, {head} head": {"personal": {"gate": gate, "head": head}, "wire": EXACT}
    for gate in ("anchored", "personal", "mixture")
    for head in ("anchored", "personal")
}
for case in CASES.values():
    if case["personal"]["gate"] == "mixture":
        case["molora"] = {"scorer": {"name": "mixture", "m": 2}}
CASES["fedsa"] = {"molora": PLAIN, "federation": {"preset": "fedsa"}, "wire": EXACT}
CASES["local"] = {"molora": PLAIN, "federation": {"preset": "local"}, "wire": EXACT}


class Witness(local.MemoryExchange):
    """An exchange that remembers who put what."""

    def __init__(self):
        super().__init__()
        self.put_by = {"server": [], "client": []}
        self.who = "server"

    def put(self, blob, at=None):
        self.put_by[self.who].append(blob)
        return super().put(blob, at)


class Watched:
    """A run of which every message and blob was kept."""

    def __init__(self, config, out, monkeypatch):
        self.config, self.out = config, out
        self.plans, self.replies = [], []
        self.exchange = connect._memories[str(out.resolve())] = Witness()
        monkeypatch.setattr(simulation, "run_local", self._engine)
        simulation.simulate(config, out)

    def _engine(self, config, out, client_app, server, observer, importable, crew):
        def app(message, context):
            self.exchange.who = "client"
            reply = client_app(message, context)
            self.exchange.who = "server"
            self.replies.append(reply.content["reply"]["json"])
            if "plan" in message.content:
                self.plans.append(ClientPlan.model_validate_json(message.content["plan"]["json"]))
            assert set(reply.content) == {"reply"}
            return reply

        assert server is server_app
        assert observer is None
        assert importable
        assert crew is None
        run_config = _run_config(config, out, f"memory:{out.resolve()}")
        server(LocalGrid(app, config.data.clients, run_config), context_of(1, SERVER_NODE, {}, run_config))

    @property
    def deltas(self):
        return [decode_delta(blob, 2**24) for blob in self.exchange.put_by["client"]]

    def personal(self):
        """Every personal tensor that was ever saved, by client."""
        states = tiny_world.states(self.out)
        assert len(states) == 6  # three clients, two rounds
        return [(key, value) for state in states.values() for key, value in state.tree.items()]


@pytest.fixture
def watched(config, tmp_path, monkeypatch):
    numbers = count()
    return lambda **sections: Watched(config(**sections), tmp_path / f"run-{next(numbers)}", monkeypatch)


def windows(data):
    """All runs of eight bytes: two numbers side by side, which no other two numbers equal by chance."""
    raw = np.frombuffer(data, np.uint8)
    if len(raw) < 8:
        return np.zeros(0, np.uint64)
    return np.unique(np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(raw, 8)).view(np.uint64))


def pairs(values):
    """Two neighbours of a tensor as eight bytes; pairs with a zero are everywhere."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    neighbours = np.stack([flat[:-1], flat[1:]], 1)
    return np.ascontiguousarray(neighbours[(neighbours != 0).all(1)]).view(np.uint64).reshape(-1)


def test_the_search_finds_what_is_there():
    secret = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert np.isin(pairs(secret), windows(b"abc" + secret.tobytes() + b"x")).all()
    assert not np.isin(pairs(secret), windows(b"abc" + (secret + np.float32(1e-6)).tobytes())).any()


@pytest.mark.parametrize("case", CASES)
def test_no_personal_tensor_leaves(watched, case):
    run = watched(**CASES[case])
    secrets = run.personal()
    assert any(value.any() for _, value in secrets)
    names = {key for key, _ in secrets}

    assert len(run.deltas) == 6
    for plan in run.plans:
        assert {key for key in names if plan.scope(key) != "personal"} == set()
    for delta in run.deltas:
        assert not names & set(delta.tree)
        assert not [key for key in delta.tree if ".residual" in key.role or ".main" in key.role]

    sent = [*run.exchange.put_by["client"], *(text.encode() for text in run.replies)]
    kept = [path.read_bytes() for path in run.out.rglob("*") if path.is_file() and "clients" not in path.parts]
    seen = np.unique(np.concatenate([windows(data) for data in (*sent, *run.exchange.put_by["server"], *kept)]))
    decoded = np.unique(np.concatenate([pairs(value) for delta in run.deltas for value in delta.tree.values()] or [[]]))
    for key, value in secrets:
        found = pairs(value)
        assert not np.isin(found, seen).any(), key.name
        assert not np.isin(found, decoded).any(), key.name


def test_what_is_personal_is_on_no_disk_in_the_clear(watched):
    run = watched(**CASES["anchored gate, anchored head"])
    kept = [path.read_bytes() for path in run.out.rglob("*") if path.is_file()]
    seen = np.unique(np.concatenate([windows(data) for data in kept]))
    for key, value in run.personal():
        assert not np.isin(pairs(value), seen).any(), key.name


def test_what_is_sent_is_the_same_with_and_without_residuals(watched):
    """So nobody can learn from the deltas more about a residual than about the rows it was fitted to."""
    sent = []
    for personal in ({"gate": "anchored", "head": "anchored"}, {"gate": "global", "head": "global"}):
        run = watched(personal=personal)
        assert any(value.any() for _, value in run.personal()) is (personal["gate"] == "anchored")
        sent.append(run.exchange.put_by["client"])
    assert len(sent[0]) == 6
    assert sent[0] == sent[1]


def test_a_client_that_sends_its_residuals_is_quarantined(watched, monkeypatch):
    """A plan that asks for residuals is refused; and from a client that forgets itself the server takes none."""
    monkeypatch.setattr(ClientPlan, "scope", lambda self, key: "shared" if key.expert == "-" else "frozen")
    with pytest.raises(FederationError, match="client-1: plan asks for what is personal: residuals never leave"):
        watched(wire=EXACT)
    monkeypatch.setattr(Client, "check", lambda self, plan: None)
    with pytest.raises(FederationError, match=r"client-1: .*gate\.residual\.weight: nobody asked for this tensor"):
        watched(wire=EXACT)


@pytest.mark.parametrize("wire", [EXACT, {"up": "int4", "down": "fp16"}], ids=["fp32", "int4"])
def test_nothing_of_the_rows_leaves(watched, wire):
    run = watched(wire=wire, evaluate={"baselines": True})
    world = open_world(run.config)
    sent = [*run.exchange.put_by["client"], *(text.encode() for text in run.replies)]
    stage_names = {"base", "local", "global", "personalised"}
    assert stage_names <= {name for name in stage_names for text in run.replies if f'"{name}"' in text}
    for owner in world.owners:
        rows = [*world.task.encode(owner.train), *world.task.encode(owner.test)]
        texts = [*owner.train["text"], *owner.test["text"]]
        needles = [text.encode() for text in texts]
        for row in rows:
            ids = row.input_ids
            needles += [np.array(ids, kind).tobytes() for kind in ("<i8", "<i4", "<i2", "u1")]
            needles += [", ".join(map(str, ids)).encode(), ",".join(map(str, ids)).encode()]
        for data in sent:
            assert not [needle for needle in needles if needle in data]
    words = {word for word in tiny_world.WORDS if len(word) > 5}
    assert not [word for word in words for text in run.replies if word in text]


def test_of_answers_only_sums_leave(watched, tmp_path):
    """Whatever else: nobody is told a word of a question, a right answer or a written one."""
    base = tiny_world.save_base(tmp_path / "base", "llama")
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(30, "llama"))
    run = watched(
        base={"model": str(base)}, data={"source": str(source)}, task={"kind": "causal-lm", "max_length": 32},
        molora={"targets": ["q_proj"]}, run={"rounds": 1}, evaluate={"generate": 2},
    )  # fmt: skip
    told = [reply for text in run.replies for reply in [json.loads(text)] if reply.get("answers")]
    assert len(told) == 3
    for reply in told:
        assert set(reply["answers"]) == {"global", "personalised"}
        for sums in reply["answers"].values():
            assert sums["n"] == 2
            assert all(isinstance(value, int | float) for value in sums.values())
    words = {word for word in tiny_world.WORDS if len(word) > 5}
    assert not [word for word in words for text in run.replies if word in text]
