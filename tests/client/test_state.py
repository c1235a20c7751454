"""Personal state on disk: encrypted, survives restarts, belongs to one place, and never appears half written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import keyring
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from keyring.backend import KeyringBackend

from molehill.errors import ConfigError, ResumeError
from molehill.tasks.outcomes import Outcomes, Parts
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_client.secret import KeyFile, Keyring, seal, unseal
from molehill_client.state import PersonalState, RowScores, StateStore


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
    assert back.k is None


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
        "round-000009.sealed",
        "round-000010.sealed",
        "round-000011.sealed",
    ]


@pytest.mark.parametrize(("other", "what"), [({"run": "another"}, "another run"), ({"base": "c" * 64}, "another base")])
def test_a_state_of_another_run_or_base_is_refused(store, other, what):
    store().save(1, state(1))
    with pytest.raises(ResumeError, match=what):
        store(**other).before(2)


def test_a_crash_while_writing_leaves_the_state_before(store, monkeypatch, tmp_path):
    store().save(1, state(1))

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("molehill_client.state.files.write", crash)
        with pytest.raises(KeyboardInterrupt):
            store().save(2, state(2))
    assert store().before(3).held == {"gate": "1"}
    store().save(2, state(2))
    assert store().before(3).held == {"gate": "2"}
    assert sorted(path.name for path in (tmp_path / "client-1").iterdir()) == [
        "round-000001.sealed",
        "round-000002.sealed",
    ]


def _die_at(call: int) -> None:
    """Have this process die right before or after it changes a folder for the n-th time."""
    left = call

    def counted(work):
        def change(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            done = work(*args, **kwargs)
            left -= 1
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return change

    for owner, name in ((os, "open"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir")):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("call", range(12))
def test_a_kill_at_any_change_of_the_folder_leaves_a_whole_state(store, tmp_path, call):
    """The process dies right before or after it changes the folder for the n-th time, while it repeats a round."""
    store().save(1, state(1))
    store().save(2, state(2))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads
        process = os.fork()
    if not process:
        try:
            with suppress(BaseException):  # nothing may unwind into this copy of pytest
                _die_at(call)
                store().save(2, state(7))
                os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    assert store().before(3).held in ({"gate": "2"}, {"gate": "7"})
    store().save(2, state(7))
    assert store().before(3).held == {"gate": "7"}
    assert store().before(2).held == {"gate": "1"}


def test_what_rows_were_scored_is_kept_for_this_run_and_in_no_clear(store, tmp_path):
    part = Parts.of_rows(np.array([0.123, 2.0]), np.array([1.0, 3.0]))
    found = RowScores([4, 4], {"local": Outcomes(2, {"loss": part})})
    assert store().load_row_scores() == RowScores()
    store().save_row_scores(found)
    back = store().load_row_scores()
    assert (back.units, back.stages.keys()) == ([4, 4], {"local"})
    assert back.stages["local"].as_json() == found.stages["local"].as_json()
    path = tmp_path / "client-1" / "outcomes.sealed"
    written = path.read_bytes()
    assert b"0.123" not in written
    assert b"local" not in written
    assert path.stat().st_mode & 0o777 == 0o600
    other = StateStore(tmp_path / "client-1", "run", "b" * 64, instance="0" * 16)
    assert other.load_row_scores() == RowScores()
    with pytest.raises(ResumeError, match="another base"):
        store(base="c" * 64).load_row_scores()
    key = KeyFile(tmp_path / "state.key").load()
    label = {"run": "run", "base": "b" * 64, "client": "client-1", "file": "outcomes.sealed"}
    for wrong in (b"7", b"{}", b'{"instance": "", "units": [], "stages": {"local": {"n": 1, "parts": 7}}}'):
        path.write_bytes(seal(wrong, label, key))
        with pytest.raises(ResumeError, match="is damaged"):
            store().load_row_scores()
    other.save(1, state(1))
    assert path.exists()  # no other run had left states here


def test_what_an_older_run_of_the_name_scored_goes_with_its_states(tmp_path):
    old, new = (StateStore(tmp_path / "client-1", "run", each * 64, instance=each * 16) for each in "bc")
    old.save(1, state(1))
    old.save_row_scores(RowScores([0], {"local": Outcomes(1, {"loss": Parts.of_rows(np.ones(1))})}))
    new.save(1, state(2))
    assert new.load_row_scores() == RowScores()


def test_no_key_is_made_where_states_need_the_old_one(store, tmp_path):
    store().save(1, state(1))
    (tmp_path / "state.key").unlink()
    for save in (lambda: store().save_row_scores(RowScores()), lambda: store().save_secret(b"")):
        with pytest.raises(ResumeError, match="the key of the personal state is not there"):
            save()
    assert not (tmp_path / "state.key").exists()


def test_nothing_is_in_the_clear(store, tmp_path):
    store().save(1, state(0.123))
    path = tmp_path / "client-1" / "round-000001.sealed"
    written = path.read_bytes()
    for secret in (np.float32(0.123).tobytes(), np.float32(-0.123).tobytes(), b"0.123", b"gate", b"site"):
        assert secret not in written
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_state_is_never_written_alike(store, tmp_path):
    path = tmp_path / "client-1" / "round-000001.sealed"
    store().save(1, state(1))
    before = path.read_bytes()
    store().save(1, state(1))
    assert path.read_bytes() != before


def test_any_changed_or_missing_byte_is_refused(store, tmp_path):
    store().save(1, state(1))
    path = tmp_path / "client-1" / "round-000001.sealed"
    whole = path.read_bytes()
    head = 11 + int.from_bytes(whole[7:11], "big")
    spots = [*range(head), *range(head, len(whole), 7), len(whole) - 1]
    for spot in spots:
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(ResumeError, match=re.escape(str(path))):
            store().before(2)
    for length in (0, 5, 11, head, head + 12, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ResumeError, match=r"damaged\. Bring it back, or remove it to go on from the round before"):
            store().before(2)
    path.unlink()
    path.mkdir()
    with pytest.raises(ResumeError, match="cannot read the personal state: Is a directory"):
        store().before(2)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, (9).to_bytes(8, "little") + b"[" * 9], ids=repr)
def test_whole_bytes_of_another_form_are_refused(store, tmp_path, data):
    store().save(1, state(1))
    key = KeyFile(tmp_path / "state.key").load()
    label = {"run": "run", "base": "b" * 64, "client": "client-1", "round": "1", "file": "state"}
    (tmp_path / "client-1" / "round-000001.sealed").write_bytes(seal(data, label, key))
    with pytest.raises(ResumeError, match="the personal state is damaged"):
        store().before(2)


def test_files_cannot_change_places(store, tmp_path):
    store().save(1, state(1))
    store().save(2, state(2))
    store().save_secret(b"secret")
    first, second, secret = (tmp_path / "client-1" / f"{n}.sealed" for n in ("round-000001", "round-000002", "masking"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ResumeError, match=r"another round \('1', not '2'\)"):
        store().before(3)
    secret.write_bytes(first.read_bytes())
    with pytest.raises(ResumeError, match="another file"):
        store().load_secret()


def test_the_state_of_another_client_is_refused(store, tmp_path):
    store().save(1, state(1))
    shutil.copytree(tmp_path / "client-1", tmp_path / "client-2")
    with pytest.raises(ResumeError, match=r"another client \('client-1', not 'client-2'\)"):
        StateStore(tmp_path / "client-2", "run", "b" * 64).before(2)


def test_the_state_of_an_older_run_of_the_same_name_is_not_gone_on_from(store, tmp_path):
    def run(instance):
        return StateStore(tmp_path / "client-1", "run", "b" * 64, instance=instance)

    for number in (1, 2):
        run("old").save(number, state(number))
    run("old").save_secret(b"which rounds were unmasked")
    assert run("old").before(3).round == 2
    assert run("new").before(3).round == 0
    assert run("old").before(3).round == 2  # to look at the new run costs the old one nothing
    run("new").save(3, state(7))
    assert run("new").rounds() == [3]
    assert run("new").before(4).held == {"gate": "7"}
    assert store().before(4).held == {"gate": "7"}
    assert run("new").load_secret() == b"which rounds were unmasked"


def test_a_damaged_note_of_the_run_loses_nothing(tmp_path):
    def run(instance):
        return StateStore(tmp_path / "client-1", "run", "b" * 64, instance=instance)

    first = "0123456789abcdef"
    run(first).save(1, state(1))
    note = tmp_path / "client-1" / "instance"
    whole = note.read_bytes()
    for spot in range(len(whole)):
        note.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(ResumeError, match="the note that says of which run the states are is damaged"):
            run(first).before(2)
        with pytest.raises(ResumeError, match="is damaged"):
            run(first).save(2, state(2))
    assert run(first).rounds() == [1]
    note.write_bytes(first.encode())  # as older versions wrote it
    assert run(first).before(2).round == 1
    assert run("f" * 16).before(2).round == 0


def test_a_newer_format_says_so(store, tmp_path):
    store().save(1, state(1))
    path = tmp_path / "client-1" / "round-000001.sealed"
    whole = path.read_bytes()
    path.write_bytes(whole[:6] + b"\x02" + whole[7:])
    with pytest.raises(ResumeError, match="has format 2, this version of Molehill reads up to 1"):
        store().before(2)


def test_format_1_can_be_read_for_good(tmp_path):
    """Written by the first version; whatever changes, this must stay readable."""
    key = bytes(range(32))
    head = b'{"base": "b", "client": "c", "file": "f", "key": "4f732237d67c1d36", "round": "1", "run": "r"}'
    sealed = b"MHSEAL\x01" + len(head).to_bytes(4, "big") + head
    sealed += bytes(12) + AESGCM(key).encrypt(bytes(12), b"what was kept", sealed)
    label = {"run": "r", "base": "b", "client": "c", "round": "1", "file": "f"}
    assert unseal(sealed, label, key, "here") == b"what was kept"


def test_one_key_for_all_clients_beside_their_folders(store, tmp_path):
    store().save(1, state(1))
    path = tmp_path / "state.key"
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    other = StateStore(tmp_path / "client-2", "run", "b" * 64)
    other.save(1, state(2))
    assert path.read_bytes() == before
    assert other.before(2).held == {"gate": "2"}


def test_a_key_of_ones_own_choice(tmp_path):
    key = KeyFile(tmp_path / "elsewhere" / "key")
    StateStore(tmp_path / "a", "run", "b", key).save(1, state(1))
    assert not (tmp_path / "state.key").exists()
    assert StateStore(tmp_path / "a", "run", "b", key).before(2).held == {"gate": "1"}


def test_another_key_and_a_key_that_is_gone(store, tmp_path):
    store().save(1, state(1))
    path = tmp_path / "state.key"
    whole = path.read_bytes()
    path.unlink()
    for call in (lambda: store().before(2), lambda: store().save(2, state(2))):
        with pytest.raises(
            ResumeError, match=r"the key of the personal state is not there \(.*state\.key\)\. Bring it back"
        ):
            call()
    assert not path.exists()
    KeyFile(path).create()
    with pytest.raises(ResumeError, match=r"encrypted with another key \([0-9a-f]{16}, this one is [0-9a-f]{16}\)"):
        store().before(2)
    path.write_bytes(whole[:-9])
    with pytest.raises(ResumeError, match=r"state\.key: not a key"):
        store().before(2)
    path.write_bytes(whole)
    path.chmod(0o644)
    with pytest.raises(ResumeError, match=r"other users can read the key .*chmod 600"):
        store().before(2)
    path.chmod(0o600)
    assert store().before(2).held == {"gate": "1"}


def test_who_comes_second_takes_the_key_of_the_first(tmp_path):
    """Two processes of one run, each of which saw that there was none."""
    keys = [KeyFile(tmp_path / "state.key") for _ in range(2)]
    assert [key.load() for key in keys] == [None, None]
    assert keys[0].create() == keys[1].create() == keys[0].load()
    assert [path.name for path in tmp_path.iterdir()] == ["state.key"]


def test_the_keyring_of_the_system(tmp_path, monkeypatch):
    class Ring(KeyringBackend):
        priority = 1

        def __init__(self):
            self.secrets = {}
            self.locked = False

        def get_password(self, service, username):
            if self.locked:
                raise keyring.errors.KeyringLocked("locked")
            return self.secrets.get((service, username))

        def set_password(self, service, username, password):
            self.secrets[service, username] = password

    ring, before = Ring(), keyring.get_keyring()
    keyring.set_keyring(ring)
    try:
        store = StateStore(tmp_path / "a", "run", "b", Keyring("lab-1"))
        store.save(1, state(1))
        assert StateStore(tmp_path / "a", "run", "b", Keyring("lab-1")).before(2).held == {"gate": "1"}
        assert list(ring.secrets) == [("molehill personal state", "lab-1")]
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        ring.locked = True
        with pytest.raises(
            ResumeError, match=r"keyring entry lab-1: the keyring cannot be read \(locked\)\. Unlock it"
        ):
            store.before(2)
    finally:
        keyring.set_keyring(before)
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(ConfigError, match=r"molehill\[keyring\]"):
        Keyring("lab-1")
