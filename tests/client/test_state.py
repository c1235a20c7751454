"""Personal state on disk: survives restarts, belongs to one run and one base, and never appears half written."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.errors import AdapterError, ResumeError
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_client.state import PersonalState, StateStore


@pytest.fixture
def store(tmp_path):
    return lambda run="run", base="b" * 64: StateStore(tmp_path / "client-1", run, base)


def state(value: float) -> PersonalState:
    tree = Tree.of({Key("site", "-", "gate.residual.weight"): np.full((2, 3), value, np.float32)})
    memory = Tree.of({Key("site", "e0", "A"): np.full((1, 3), -value, np.float32)})
    return PersonalState(tree, memory, {"gate": f"{value}"})


def test_who_never_trained_has_nothing(store):
    empty = store().before(9)
    assert (len(empty.tree), len(empty.memory), empty.held) == (0, 0, {})


def test_a_state_comes_back_in_another_process(store):
    store().save(1, state(0.5))
    back = store().before(2)
    assert back.tree.digest == state(0.5).tree.digest
    assert back.memory.digest == state(0.5).memory.digest
    assert back.held == {"gate": "0.5"}


def test_a_round_sees_the_newest_state_before_it(store):
    for number in (1, 2, 4):
        store().save(number, state(number))
    held = [store().before(number).held.get("gate") for number in (1, 2, 3, 4, 5, 99)]
    assert held == [None, "1", "2", "2", "4", "4"]


def test_a_repeated_round_replaces_its_state(store):
    store().save(1, state(1))
    store().save(1, state(7))
    assert store().before(2).held == {"gate": "7"}


def test_old_rounds_are_dropped_but_enough_stay_to_repeat_one(store, tmp_path):
    for number in range(1, 12):
        store().save(number, state(number))
    assert sorted(path.name for path in (tmp_path / "client-1").iterdir()) == [
        "round-000009",
        "round-000010",
        "round-000011",
    ]


@pytest.mark.parametrize(("other", "what"), [({"run": "another"}, "another run"), ({"base": "c" * 64}, "another base")])
def test_a_state_of_another_run_or_base_is_refused(store, other, what):
    store().save(1, state(1))
    with pytest.raises(ResumeError, match=what):
        store(**other).before(2)


def test_a_crash_while_writing_leaves_the_state_before(store, monkeypatch, tmp_path):
    store().save(1, state(1))

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("molehill_client.state.save_tree", crash)
        with pytest.raises(KeyboardInterrupt):
            store().save(2, state(2))
    assert store().before(3).held == {"gate": "1"}
    store().save(2, state(2))
    assert store().before(3).held == {"gate": "2"}
    assert sorted(path.name for path in (tmp_path / "client-1").iterdir()) == ["round-000001", "round-000002"]


def test_a_damaged_file_is_an_error_that_names_it(store, tmp_path):
    store().save(1, state(1))
    (tmp_path / "client-1" / "round-000001" / "personal.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(AdapterError, match=r"personal\.safetensors"):
        store().before(2)
