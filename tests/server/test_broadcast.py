"""What is sent down, and how patches grow on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_federation import D_IN, D_OUT, SITE, initial

from molehill.config import MethodRef
from molehill.wire.keys import Key
from molehill.wire.local import FolderExchange, MemoryExchange
from molehill.wire.message import decode_tree
from molehill_server.aggregation.lowrank import concat
from molehill_server.broadcast import Broadcast, groups, patch_tree, tree_patches
from molehill_server.records import Global, LowRank

PAIR = (SITE, "e0")


def low_rank(rng, rank):
    return LowRank(rng.normal(size=(D_OUT, rank)).astype(np.float32), rng.normal(size=(rank, D_IN)).astype(np.float32))


def broadcast(codec="fp32"):
    return Broadcast(MemoryExchange(), MethodRef(name=codec), 2**20)


def held(one):
    """What a client puts together from the blobs."""
    trees = [decode_tree(one.exchange.get(digest), 2**20) for digest in one.digests().values()]
    plain = {key: value for tree in trees for key, value in tree.items() if key.kind != "patch"}
    patches = [tree_patches(tree) for tree in trees if any(key.kind == "patch" for key in tree)]
    return plain, [patch[PAIR] for patch in patches if PAIR in patch]


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_server_and_clients_mean_the_same_values(codec):
    one = broadcast(codec)
    glob = one.publish(Global(initial()))
    plain, _ = held(one)
    assert set(plain) == set(glob.tree)
    assert all(np.array_equal(plain[key], glob.tree[key]) for key in plain)
    before = one.digests()
    again = one.publish(glob)
    assert one.digests() == before  # nothing changed, nothing is sent
    assert np.array_equal(again.tree.flat, glob.tree.flat)


def test_only_changed_groups_are_sent_and_old_blobs_go():
    one = broadcast()
    glob = one.publish(Global(initial()))
    assert set(one.digests()) == {"e0.A", "e0.B", "e1.A", "e1.B", "gate", "head"} == set(groups(glob.tree))
    before = one.digests()
    glob.tree[Key(*PAIR, "B")][...] += 1
    one.publish(glob)
    changed = {name for name, digest in one.digests().items() if before[name] != digest}
    assert changed == {"e0.B"}
    assert set(one.exchange._blobs) == set(one.digests().values())
    one.drop()
    assert not one.exchange._blobs


@pytest.mark.parametrize("damage", [b"", b"\0" * 100])
def test_a_blob_that_was_damaged_while_nobody_served_is_put_again(tmp_path, damage):
    one = Broadcast(FolderExchange(tmp_path), MethodRef(name="fp32"), 2**20)
    glob = one.publish(Global(initial()))
    for digest in one.digests().values():
        (tmp_path / digest).write_bytes(damage)
    other = Broadcast(FolderExchange(tmp_path), MethodRef(name="fp32"), 2**20, dict(one.blobs))
    other.publish(glob)
    plain, _ = held(other)
    assert all(np.array_equal(plain[key], glob.tree[key]) for key in glob.tree)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from(["fp32", "fp16"]))
def test_patches_are_appended_and_add_up(ranks, codec):
    rng = np.random.default_rng(0)
    one, glob, digests = broadcast(codec), Global(initial()), {}
    for number, rank in enumerate(ranks, start=1):
        patches = dict(glob.patches)
        if rank:
            added = low_rank(rng, rank)
            patches[PAIR] = concat([patches[PAIR], added]) if PAIR in patches else added
        glob = one.publish(Global(glob.tree, patches, {}, number))
        sent = {name: digest for name, digest in one.digests().items() if name.startswith("patch.")}
        assert digests.items() <= sent.items()  # what was sent stays as it was
        assert set(sent) - set(digests) == ({f"patch.{number}"} if rank else set())
        digests = sent
        parts = held(one)[1]
        if parts:
            whole = concat(parts)
            np.testing.assert_array_equal(whole.B @ whole.A, glob.patches[PAIR].B @ glob.patches[PAIR].A)
            np.testing.assert_allclose(whole.B @ whole.A, patches[PAIR].B @ patches[PAIR].A, atol=0.05)


def test_folded_patches_replace_what_was_sent():
    rng = np.random.default_rng(0)
    one = broadcast()
    one.publish(Global(initial(), {PAIR: low_rank(rng, 3)}, {}, 1))
    folded = low_rank(rng, 4)
    one.publish(Global(initial(), {PAIR: folded}, {}, 2))
    (part,) = held(one)[1]
    assert np.array_equal(part.A, folded.A)
    assert [name for name in one.digests() if name.startswith("patch.")] == ["patch.2"]


def test_patches_as_a_tree_and_back():
    patches = {(SITE, e): low_rank(np.random.default_rng(1), 2) for e in ("e0", "e1")}
    back = tree_patches(patch_tree(patches))
    assert list(back) == sorted(patches)
    assert all(np.array_equal(back[pair].B, patches[pair].B) for pair in patches)
