"""Experts come and go in a bundle's slots."""

from __future__ import annotations

import threading
import time

import edge_graphs
import numpy as np
import pytest
import safetensors.numpy

from molehill.errors import AnswerError, BundleError
from molehill_edge import manifest as manifests
from molehill_edge import tensors
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal

TRUST = InsecureLocal(lambda _: None)
TEXTS = ["the film was great", "awful plot", "boring"]


@pytest.fixture
def folder(tmp_path):
    edge_graphs.classifier(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def bundle(folder):
    with Bundle.open(folder, trust=TRUST, threads=1) as opened:
        yield opened


def probabilities(view):
    return np.array([list(each.probabilities.values()) for each in view.classify(TEXTS)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def used(view, name):
    return [dict(zip(r.experts, r.shares, strict=True)).get(name) for r in view.route_report("the film was great")]


def test_an_added_expert_computes_what_it_should(bundle, folder, tmp_path):
    path = edge_graphs.write_expert(tmp_path / "owls.expert.safetensors", bundle.manifest)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    view = bundle.with_gate("ann")
    old = probabilities(bundle), probabilities(view)
    assert bundle.add_expert(path) == "owls"
    assert [slot.id for slot in bundle.manifest.slots] == ["cats", "dogs", "newts", "owls"]
    assert all(share > 0 for share in used(bundle, "owls"))
    new = probabilities(bundle), probabilities(view)
    assert not np.allclose(old[0], new[0], atol=1e-3)
    assert not np.allclose(old[1], new[1], atol=1e-3)

    # The same numbers by hand.
    found = safetensors.numpy.load_file(path)
    base = safetensors.numpy.load_file(folder / manifests.EXPERTS)
    row, site = "layers.0.up/-/gate.weight", "layers.0.up"
    placed = safetensors.numpy.load_file(bundle._engine.session.folder / manifests.EXPERTS)
    assert np.array_equal(placed[f"{site}/A"][:, -2:], found[f"{site}/A"].T)
    assert np.array_equal(placed[f"{site}/B"][-2:], found[f"{site}/B"].T)
    assert np.array_equal(placed[f"{site}/A"][:, :-2], base[f"{site}/A"][:, :-2])
    gate = view.gate_tensors()[row]
    assert np.array_equal(gate[3], found[row])
    assert np.array_equal(gate[:3], view.gate.tensors[row][:3])

    # Nothing that was checked has changed.
    assert all(path.read_bytes() == data for path, data in before.items())
    bundle.remove_expert("owls")
    assert np.array_equal(probabilities(bundle), old[0])
    assert np.array_equal(probabilities(view), old[1])


def test_a_removed_expert_makes_room_for_another(bundle, tmp_path):
    bundle.remove_expert("dogs")
    assert used(bundle, "dogs") == [None, None]
    one = edge_graphs.write_expert(tmp_path / "one", bundle.manifest, "owls", seed=1)
    two = edge_graphs.write_expert(tmp_path / "two", bundle.manifest, "bats", seed=2)
    bundle.add_expert(one)
    bundle.add_expert(two)
    assert sorted(slot.id for slot in bundle.manifest.slots) == ["bats", "cats", "newts", "owls"]
    both = probabilities(bundle)
    bundle.remove_expert("owls")
    bundle.add_expert(one)
    assert np.allclose(probabilities(bundle), both, atol=1e-6)
    with pytest.raises(BundleError, match="no empty slot"):
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "three", bundle.manifest, "eels"))


def test_the_last_expert_and_shared_ones_stay(bundle):
    for name in ("cats", "dogs"):
        bundle.remove_expert(name)
    with pytest.raises(BundleError, match=r"newts is the last of router layers.0.up"):
        bundle.remove_expert("newts")
    with pytest.raises(BundleError, match=r"no expert 'cats'.*There are: newts"):
        bundle.remove_expert("cats")
    with pytest.raises(BundleError, match="no expert ''"):
        bundle.remove_expert("")
    bundle.manifest.slots[2].shared = True
    with pytest.raises(BundleError, match="is shared by all tokens"):
        bundle.remove_expert("newts")


def test_a_gate_that_chooses_only_what_is_removed(bundle):
    bundle.choose_experts(["dogs"])
    before = probabilities(bundle)
    with pytest.raises(BundleError, match=r"leaves router layers.0.up without experts"):
        bundle.remove_expert("dogs")
    assert np.array_equal(probabilities(bundle), before)


SITE, ROW = "layers.1.up", "layers.1.up/-/gate.weight"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"base": "cd" * 32}, "the expert is for another base model"),
        ({"rank": 3}, "has rank 3 at layers.0.up, the slot 2"),
        ({"name": "cats"}, "has an expert cats already"),
        ({"name": ""}, "the expert has no id"),
        ({"drop": [f"{SITE}/A", f"{SITE}/B"]}, f"the expert lacks {SITE}"),
        ({"drop": [f"{SITE}/A"]}, f"the expert has {SITE}/B, which the bundle does not know"),
        ({"layers.7.up/A": np.zeros((2, 16), np.float32)}, "the expert has layers.7.up/A"),
        ({"drop": [ROW]}, f"the expert lacks its row of {ROW}"),
        ({ROW: np.zeros(17, np.float32)}, r"row of .* has shape \[17\] where \[16\] fits"),
        ({f"{SITE}/A": np.zeros((2, 15), np.float32)}, r"A of layers.1.up has shape \[2, 15\]"),
        ({f"{SITE}/B": np.full((16, 2), np.inf, np.float32)}, "B of layers.1.up holds numbers that are not finite"),
        ({f"{SITE}/A": np.zeros((2, 16))}, "A of layers.1.up is float64"),
        ({f"{SITE}/A": np.zeros((2, 16, 1), np.float32)}, "A of layers.1.up has shape"),
    ],
)
def test_experts_that_do_not_fit(bundle, tmp_path, keys, what):
    before = probabilities(bundle)
    path = edge_graphs.write_expert(tmp_path / "odd", bundle.manifest, **keys)
    with pytest.raises(BundleError, match=what):
        bundle.add_expert(path)
    assert np.array_equal(probabilities(bundle), before)
    assert names(tmp_path) == ["classifier", "odd"]  # no run folder is left


def test_files_that_are_no_experts(bundle, tmp_path):
    with pytest.raises(BundleError, match="not an expert file"):
        bundle.add_expert(edge_graphs.write_gate(tmp_path / "gate", bundle.manifest))
    with pytest.raises(BundleError, match="cannot read it"):
        bundle.add_expert(tmp_path / "nothing")


def test_a_session_that_does_not_open_leaves_the_old_one(bundle, tmp_path, monkeypatch):
    before = probabilities(bundle)
    session = bundle._engine.session
    real, calls = session._open, []

    def refuse_first(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise BundleError("no")
        return real(folder)

    monkeypatch.setattr(session, "_open", refuse_first)
    with pytest.raises(BundleError, match="no"):
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
    assert np.array_equal(probabilities(bundle), before)
    assert names(tmp_path) == ["classifier", "owls"]


def test_run_folders_go_when_the_bundle_closes(folder, tmp_path):
    path = edge_graphs.write_expert(tmp_path / "owls", edge_graphs.classifier(tmp_path / "same"))
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.add_expert(path)
        assert len([name for name in names(tmp_path) if name.startswith(".classifier.")]) == 1
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_threads_go_on_while_experts_change(bundle, tmp_path):
    path = edge_graphs.write_expert(tmp_path / "owls", bundle.manifest)
    without = probabilities(bundle)
    bundle.add_expert(path)
    with_ = probabilities(bundle)
    bundle.remove_expert("owls")
    view, wrong, stop = bundle.with_gate("default"), [], threading.Event()

    def work():
        while not stop.is_set():
            found = probabilities(view)
            if not (np.allclose(found, with_, atol=1e-6) or np.allclose(found, without, atol=1e-6)):
                wrong.append(found)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        bundle.add_expert(path)
        bundle.remove_expert("owls")
    stop.set()
    thread.join()
    assert not wrong


def test_state_is_kept_beside_the_bundle(folder, tmp_path):
    state = tmp_path / "state"
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.swap_gate("ann")
        bundle.remove_expert("cats")
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
        bundle.save_state(state)
        wanted, ids = probabilities(bundle), [slot.id for slot in bundle.manifest.slots]
        bob = probabilities(bundle.with_gate("bob"))
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.load_state(state)
        assert [slot.id for slot in bundle.manifest.slots] == ids
        assert np.array_equal(probabilities(bundle), wanted)
        assert np.array_equal(probabilities(bundle.with_gate("bob")), bob)
        assert bundle.gate.name == "ann"
    (state / "state.json").write_text("{}")
    with Bundle.open(folder, trust=TRUST) as bundle, pytest.raises(BundleError, match=r"state.json: damaged"):
        bundle.load_state(state)
    edge_graphs.causal(tmp_path / "other")
    with Bundle.open(tmp_path / "other", trust=TRUST) as other:
        other.save_state(tmp_path / "others")
    with Bundle.open(folder, trust=TRUST) as bundle, pytest.raises(BundleError, match="the state of another bundle"):
        bundle.load_state(tmp_path / "others")


def test_a_pulled_bundle_takes_experts_and_its_store_stays_as_it_was(tmp_path):
    from edge_bundles import Memory

    from molehill_edge import fetch
    from molehill_edge.store import Store
    from molehill_export.keys import Keys
    from molehill_export.repository import Repository

    Keys.create(tmp_path / "keys", b"secret")
    keys = Keys(tmp_path / "keys", b"secret")
    edge_graphs.classifier(tmp_path / "made")
    Repository(tmp_path / "repo", keys).publish(tmp_path / "made")
    server, store = Memory(tmp_path / "repo"), Store(tmp_path / "store")
    fetch.pull(store, server.address, fetcher=server, root=keys.root_path(1).read_bytes())
    files = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}

    with Bundle.open("tiny-classifier", trust=store) as bundle:
        before = probabilities(bundle)
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
        assert not np.allclose(probabilities(bundle), before, atol=1e-3)
        with Bundle.open("tiny-classifier", trust=store) as other:  # meanwhile
            assert np.array_equal(probabilities(other), before)
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == files


def test_ids_of_experts(bundle, tmp_path):
    for name in ("../../x", "a\x1b[31m", "x" * 200, "[red]x"):
        path = edge_graphs.write_expert(tmp_path / "odd", bundle.manifest, name)
        with pytest.raises(BundleError, match="cannot be the id of an expert") as caught:
            bundle.add_expert(path)
        assert "\x1b" not in str(caught.value)


def test_a_model_that_runs_over(bundle, tmp_path):
    before = probabilities(bundle)
    path = edge_graphs.write_expert(tmp_path / "owls", bundle.manifest)
    found, about = tensors.read(path)
    big = {name: np.where(value > 0, 3e38, -3e38).astype(np.float32) for name, value in found.items()}
    tensors.write(path, big, about)
    bundle.add_expert(path)
    with pytest.raises(AnswerError, match="numbers that are not finite"):
        bundle.classify(TEXTS)
    bundle.remove_expert("owls")
    assert np.array_equal(probabilities(bundle), before)


def test_an_expert_added_later_may_be_chosen(bundle, tmp_path):
    view = bundle.with_gate("default")
    for each in (bundle, view):
        each.choose_experts(["cats"])
    bundle.remove_expert("dogs")
    for name in ("owls", "bats"):  # in the slot of dogs, which was left out, and in the empty one
        bundle.add_expert(edge_graphs.write_expert(tmp_path / name, bundle.manifest, name))
    assert all(share > 0 for share in used(bundle, "owls") + used(bundle, "bats") + used(view, "bats"))
    assert max(used(bundle, "newts")) < 1e-6
    bundle.choose_experts(["cats"])
    assert max(used(bundle, "owls") + used(bundle, "bats")) < 1e-6


def test_a_state_without_experts_of_its_own_knows_its_bundle(folder, tmp_path):
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.remove_expert("dogs")
        bundle.choose_experts(["cats"])
        bundle.save_state(tmp_path / "state")
    assert not (tmp_path / "state" / manifests.EXPERTS).exists()
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.load_state(tmp_path / "state")
        assert used(bundle, "dogs") == [None, None]
        assert max(used(bundle, "newts")) < 1e-6
    manifest = edge_graphs.classifier(tmp_path / "other", seed=5)
    assert manifest.base.digest == edge_graphs.BASE
    with Bundle.open(tmp_path / "other", trust=TRUST) as other:
        before = probabilities(other)
        with pytest.raises(BundleError, match="has other experts than when the state was saved"):
            other.load_state(tmp_path / "state")
        assert np.array_equal(probabilities(other), before)


def test_a_state_is_for_its_owner_only(bundle, tmp_path):
    bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
    bundle.choose_experts(["cats"])
    bundle.save_state(tmp_path / "state")
    kept = list((tmp_path / "state").iterdir())
    assert len(kept) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)


def test_a_state_keeps_which_experts_were_chosen(folder, tmp_path):
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
        bundle.choose_experts(["cats"])
        bundle.save_state(tmp_path / "state")
        wanted = probabilities(bundle)
    with Bundle.open(folder, trust=TRUST) as bundle:
        bundle.load_state(tmp_path / "state")
        assert np.array_equal(probabilities(bundle), wanted)


def test_a_change_waits_for_calls_that_run_and_not_for_others(bundle, tmp_path):
    session, stop, done = bundle._engine.session, threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            with session.use():
                time.sleep(0.02)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for i, thread in enumerate(threads):
        thread.start()
        time.sleep(0.007 * i)  # so that one is always running

    def change():
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
        bundle.remove_expert("owls")
        done.set()

    changer = threading.Thread(target=change)
    changer.start()
    came = done.wait(5)
    stop.set()
    for thread in (*threads, changer):
        thread.join()
    assert came


def test_a_change_between_gate_and_graph_is_not_seen(bundle, tmp_path, monkeypatch):
    """A change that comes as a call has taken its gate waits until the call is done."""
    path = edge_graphs.write_expert(tmp_path / "owls", bundle.manifest)
    without = probabilities(bundle)
    view = bundle.with_gate("default")
    real, changers = view._bound.inputs, []

    def inputs():
        taken = real()
        if not changers:
            changers.append(threading.Thread(target=bundle.add_expert, args=(path,)))
            changers[0].start()
            time.sleep(0.1)
        return taken

    monkeypatch.setattr(view._bound, "inputs", inputs)
    found = view.logits(view.encode_all(TEXTS * 20))  # several batches
    changers[0].join()
    monkeypatch.undo()
    assert np.allclose(found[:3], found[-3:], atol=1e-6)
    assert np.array_equal(
        bundle.with_gate("default").logits(view.encode_all(TEXTS)), view.logits(view.encode_all(TEXTS))
    )
    bundle.remove_expert("owls")
    assert np.array_equal(probabilities(view), without)
