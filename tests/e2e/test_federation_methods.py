"""Three rounds of every federation preset: clients and server mean the same model, and bytes are what is new."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny_world import events

from molehill import registry
from molehill.wire.connect import connect
from molehill.wire.keys import Key
from molehill.wire.store import load_tree
from molehill_server.broadcast import Broadcast
from molehill_simulation import world
from molehill_simulation.simulate import simulate

EXACT = {"up": "fp32", "down": "fp32"}
MIXED = {"name": "mixed_rank", "ranks": [1, 2, 3]}
RUNS = {
    "fedit": {},
    "ffa": {},
    "fedsvd": {},
    "fedsa": {},
    "rolora": {},
    "flora": {},
    "cola": {},
    "fedex": {},
    "flexlora": {},
    "hetlora": {"policy": MIXED},
    "fedpeft": {},
    "local": {},
    "fedamole": {},
    "flora of mixed ranks": {"policy": MIXED},
    "flexlora of mixed ranks": {"policy": MIXED},
}
OWN_B = {"fedsa", "local"}  # there B stays with the client
OWN_GATE = {"fedamole"}  # there a part of the router does


def product(tensors, site, expert, *, patched=False):
    """``B A`` of an expert, and of its patches."""
    value = tensors[Key(site, expert, "B")] @ tensors[Key(site, expert, "A")]
    if patched and Key(site, expert, "patch.A") in tensors:
        value = value + tensors[Key(site, expert, "patch.B")] @ tensors[Key(site, expert, "patch.A")]
    return value


def pairs(tree):
    return sorted({(key.site, key.expert) for key in tree if key.role == "A"})


class Seen:
    """A run, with what the server published each time and the model as the last client left it."""

    def __init__(self, config, out, monkeypatch):
        self.out, self.published = out, []
        publish = Broadcast.publish

        def note(broadcast, glob):
            result = publish(broadcast, glob)
            blobs = {group: (blob.digest, len(blob.data)) for group, blob in broadcast.blobs.items()}
            self.published.append((result, blobs))
            return result

        def at_the_end(event):
            if event["event"] == "end":
                model = world.world_of((out / "config.toml").read_text()).model
                self.values = dict(model.tree())
                for site, expert in pairs(self.values):
                    bank = model.sites[site].bank
                    mine = bank.patch_expert == model.expert_ids(model.sites[site]).index(expert)
                    self.values[Key(site, expert, "patch.A")] = bank.patch_A[mine].numpy()
                    self.values[Key(site, expert, "patch.B")] = bank.patch_Bt[mine].numpy().T

        with monkeypatch.context() as patch:
            patch.setattr(Broadcast, "publish", note)
            self.summary = simulate(config, out, observer=at_the_end)
        self.rounds = events(out, "round")


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """Three rounds of a preset."""

    def start(name):
        preset = name.partition(" ")[0]
        settings = config(
            run={"rounds": 3},
            molora={"rank": 3},
            personal={"gate": "split" if preset in OWN_GATE else "global", "head": "global"},
            federation={"preset": preset, **RUNS[name]},
            wire=EXACT,
        )
        return Seen(settings, tmp_path / preset, monkeypatch)

    return start


def test_every_preset_is_here():
    here = {name.partition(" ")[0] for name in RUNS}
    apart = {"fedlease", "fedrouter"}  # in which clients do not begin with one model
    assert {method.name for method in registry.methods("federation")} == here | apart


@pytest.mark.parametrize("name", RUNS)
def test_server_and_clients_mean_the_same_model(run, name):
    seen = run(name)
    assert [len(event["accepted"]) for event in seen.rounds] == [3, 3, 3]
    final, _ = load_tree(seen.out / "final.safetensors")
    glob = seen.published[-1][0]
    assert glob.round == 3
    moved = False
    for site, expert in pairs(final):
        server = product(glob.tree, site, expert)
        if (site, expert) in glob.patches:
            patch = glob.patches[site, expert]
            server = server + patch.B @ patch.A
        np.testing.assert_allclose(product(final, site, expert, patched=True), server, atol=1e-6)
        if name not in OWN_B:
            np.testing.assert_allclose(product(seen.values, site, expert, patched=True), server, atol=1e-6)
        moved |= bool(np.abs(server).max() > 1e-6)  # all start at zero
    assert moved == (name not in OWN_B)
    assert any(key.role == "patch.A" for key in final) == (name.partition(" ")[0] in {"flora", "fedex", "cola"})


@pytest.mark.parametrize("name", RUNS)
def test_bytes_down_are_those_of_blobs_that_changed(run, name):
    seen = run(name)
    before: dict[str, str] = {}
    for event, (_, blobs) in zip(seen.rounds, seen.published, strict=False):
        new = sum(size for group, (digest, size) in blobs.items() if before.get(group) != digest)
        assert event["bytes_down"] == 3 * new
        before = {group: digest for group, (digest, _) in blobs.items()}
    assert seen.summary.bytes_down == sum(event["bytes_down"] for event in seen.rounds)
    assert connect(f"memory:{seen.out.resolve()}")._blobs == {}  # nothing is left behind


def test_what_is_frozen_is_sent_once(run):
    seen = run("ffa")
    sizes = {group: size for group, (_, size) in seen.published[0][1].items()}
    down = [event["bytes_down"] for event in seen.rounds]
    assert down[0] == 3 * sum(sizes.values())
    assert down[1] == down[2] == 3 * sum(size for group, size in sizes.items() if not group.endswith(".A"))
    assert len({blobs["e0.A"] for _, blobs in seen.published}) == 1


def test_rolora_sends_one_factor_a_round(run):
    blobs = [each for _, each in run("rolora").published]
    changed = [
        {group[-1] for group in after if group[-1] in "AB" and after[group] != before[group]}
        for before, after in itertools.pairwise(blobs[:4])
    ]
    assert changed == [{"B"}, {"A"}, {"B"}]


def test_clients_of_lower_rank_send_less(run):
    assert run("hetlora").summary.bytes_up < 0.8 * run("fedit").summary.bytes_up
