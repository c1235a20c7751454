"""Gates: read, refused, exchanged."""

from __future__ import annotations

import contextlib
import time

import edge_graphs
import numpy as np
import pytest
import safetensors.numpy

from molehill.errors import BundleError
from molehill_edge import experts, gates
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal

TRUST = InsecureLocal(lambda _: None)
TEXTS = ["the film was great", "awful plot", "boring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "classifier"
    edge_graphs.classifier(path)
    return path


@pytest.fixture
def bundle(folder):
    with Bundle.open(folder, trust=TRUST, threads=1) as opened:
        yield opened


def probabilities(view):
    return np.array([list(each.probabilities.values()) for each in view.classify(TEXTS)])


def test_the_default_gate_is_the_graphs_own(bundle):
    ids = bundle.encode("the film was great")
    row = np.array([ids], np.int64)
    with bundle._engine.session.use() as graph:
        (plain,) = graph.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})
    assert np.array_equal(plain, bundle.logits([ids]))


def test_swapping_and_swapping_back(bundle, folder, tmp_path):
    assert bundle.gates() == ["ann", "bob"]
    default = probabilities(bundle)
    bundle.swap_gate("ann")
    ann = probabilities(bundle)
    bundle.swap_gate(folder / "gates" / "bob.safetensors")
    bob = probabilities(bundle)
    assert not np.allclose(default, ann, atol=1e-3)
    assert not np.allclose(bob, ann, atol=1e-3)
    bundle.swap_gate("default")
    assert np.array_equal(probabilities(bundle), default)
    assert np.array_equal(probabilities(bundle.with_gate("ann")), ann)
    assert np.array_equal(probabilities(bundle), default)


def test_a_refused_gate_leaves_the_one_in_use(bundle, tmp_path):
    bundle.swap_gate("ann")
    ann = probabilities(bundle)
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    with pytest.raises(BundleError):
        bundle.swap_gate(tmp_path / "bad.safetensors")
    assert np.array_equal(probabilities(bundle), ann)
    assert bundle.gate.name == "ann"


def test_a_gate_that_was_read_is_swapped_at_once(bundle):
    ann, bob = bundle.read_gate("ann"), bundle.read_gate("bob")
    taken = []
    for gate in [ann, bob] * 20:
        begin = time.perf_counter()
        bundle.swap_gate(gate)
        taken.append(time.perf_counter() - begin)
    assert np.median(taken) < 1e-3


def test_bias_and_mask_of_a_gate(bundle, tmp_path):
    manifest = bundle.manifest
    bias = np.tile(np.array([0, 0, 3, 0], np.float32), 2)
    mask = np.tile(np.array([True, False, True, True]), 2)
    path = edge_graphs.write_gate(tmp_path / "me.safetensors", manifest, router_bias=bias, expert_mask=mask)
    plain = edge_graphs.write_gate(tmp_path / "plain.safetensors", manifest)
    mine, shared = bundle.with_gate(path), bundle.with_gate(plain)
    for report, other in zip(mine.route_report("fine"), shared.route_report("fine"), strict=True):
        with_, without = (dict(zip(r.experts, r.shares, strict=True)) for r in (report, other))
        assert with_["dogs"] < 1e-6 < without["dogs"]
        assert with_["newts"] > without["newts"]


def test_written_gates_are_read_back(bundle, tmp_path):
    rng = np.random.default_rng(0)
    gate = gates.Gate(
        "me", {name: value * 2 for name, value in bundle.gate.tensors.items()},
        rng.standard_normal(8).astype(np.float32), np.array([True, False, True, True] * 2),
    )  # fmt: skip
    gates.write(tmp_path / "me.safetensors", gate, bundle.manifest)
    assert (tmp_path / "me.safetensors").stat().st_mode & 0o077 == 0
    back = gates.read(tmp_path / "me.safetensors", bundle.manifest)
    assert back.name == "me"
    assert np.array_equal(back.bias, gate.bias)
    assert np.array_equal(back.mask, gate.mask)
    assert all(np.array_equal(back.tensors[name], value) for name, value in gate.tensors.items())


def _file(tmp_path, manifest, change=lambda tensors, metadata: None):
    path = edge_graphs.write_gate(tmp_path / "odd.safetensors", manifest)
    tensors = safetensors.numpy.load_file(path)
    metadata = edge_graphs.gate_metadata(manifest, "odd")
    change(tensors, metadata)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path


ROUTER = "layers.0.up/-/gate.weight"
NAN = np.full((4, 16), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t, m: m.update(base="cd" * 32), "the gate is for another base model"),
        (lambda t, m: m.update(layout="00" * 32), "another layout"),
        (lambda t, m: m.pop("slots"), "the gate is damaged: it does not say which experts it is for"),
        (lambda t, m: m.update(slots="{"), "the gate is damaged"),
        (lambda t, m: m.update(slots='["cats", "dogs", "newts"]'), "the gate is damaged"),
        (lambda t, m: m.update(slots='["cats", "dogs", "newts", 0]'), "the gate is damaged"),
        (lambda t, m: m.update(slots='["cats", "eels", "newts", ""]'), "for expert 'eels' where the bundle has dogs"),
        (lambda t, m: m.update(format="2"), "a gate file of format '2'"),
        (lambda t, m: m.update(kind="expert"), "not a gate file"),
        (lambda t, m: m.clear(), "not a gate file"),
        (lambda t, m: t.pop(ROUTER), f"the gate lacks {ROUTER}"),
        (lambda t, m: t.update(more=np.zeros(3, np.float32)), "the gate has more, which the bundle does not know"),
        (lambda t, m: t.update({ROUTER: NAN}), "holds numbers that are not finite"),
        (lambda t, m: t.update({ROUTER: NAN[:, :3]}), r"has shape \[4, 3\] where \[4, 16\] fits"),
        (lambda t, m: t.update({ROUTER: np.zeros((4, 16))}), "is float64, not float32"),
        (lambda t, m: t.update(router_bias=np.zeros(7, np.float32)), r"router_bias has shape \[7\]"),
        (lambda t, m: t.update(expert_mask=np.ones(7, np.uint8)), "not one bit for each of 8 experts"),
        (lambda t, m: t.update(expert_mask=np.ones(8, np.float32)), "not one bit for each of 8 experts"),
        (lambda t, m: t.update(expert_mask=np.zeros(8, bool)), "leaves router layers.0.up without experts"),
    ],
)
def test_gates_that_do_not_fit(bundle, tmp_path, change, what):
    path = _file(tmp_path, bundle.manifest, change)
    with pytest.raises(BundleError, match=what):
        bundle.swap_gate(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\x10" + b"\0" * 7 + b"{"])
def test_damaged_gates(bundle, tmp_path, data):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"damaged.safetensors"):
        bundle.swap_gate(path)


def test_no_such_gate(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"^tiny-classifier: no gate 'carl'.*default, ann, bob"):
        bundle.swap_gate("carl")
    with pytest.raises(BundleError, match="cannot read it"):
        bundle.swap_gate(tmp_path / "nothing.safetensors")
    with pytest.raises(BundleError, match="cannot write it"):
        gates.write(tmp_path / "nowhere" / "gate.safetensors", bundle.gate, bundle.manifest)


def test_any_damage_to_a_gate_or_an_expert_is_one_clear_refusal(bundle, tmp_path):
    rng = np.random.default_rng(0)
    gate = edge_graphs.write_gate(tmp_path / "gate", bundle.manifest).read_bytes()
    expert = edge_graphs.write_expert(tmp_path / "expert", bundle.manifest).read_bytes()
    path = tmp_path / "damaged"
    for data, take in [(gate, bundle.read_gate), (expert, lambda file: experts.read(file, bundle.manifest))] * 150:
        damaged = bytearray(data)
        header = 8 + int.from_bytes(data[:8], "little")
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, header)] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(0, len(data))] if rng.random() < 0.3 else damaged)
        with contextlib.suppress(BundleError):  # some changes mean nothing
            take(path)


def test_gates_of_slots_that_changed(bundle, tmp_path):
    mine = tmp_path / "mine.safetensors"
    bundle.remove_expert("dogs")
    gates.write(tmp_path / "without.safetensors", bundle.gate, bundle.manifest)
    bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
    owls = [slot.id for slot in bundle.manifest.slots].index("owls")
    assert owls == 1  # where the bundle's gates have a row for dogs
    row = bundle.gate_tensors()[ROUTER][owls]
    for gate in ("ann", tmp_path / "without.safetensors"):
        bundle.swap_gate(gate)
        assert np.array_equal(bundle.gate_tensors()[ROUTER][owls], row)
    gates.write(mine, bundle.gate, bundle.manifest)
    bundle.swap_gate(mine)
    bundle.remove_expert("owls")
    bundle.swap_gate(mine)
    assert "owls" not in bundle.route_report("fine")[0].experts


def test_a_gate_for_other_experts_of_the_same_layout(bundle, folder, tmp_path):
    manifest = bundle.manifest
    for slot, name in zip(manifest.slots, ("bats", "eels", "", ""), strict=True):
        slot.id = name
    gates.write(tmp_path / "gate.safetensors", bundle.gate, manifest)
    with Bundle.open(folder, trust=TRUST) as other:
        assert other.manifest.layout == manifest.layout
        with pytest.raises(BundleError, match=r"for expert 'bats' where the bundle has cats"):
            other.swap_gate(tmp_path / "gate.safetensors")
