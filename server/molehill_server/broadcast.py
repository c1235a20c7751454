"""What the server sends down: the shared model as blobs in the exchange, one per group of tensors.

A group whose values did not change keeps its blob, so a client that has it fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.wire.exchange import Exchange
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.message import decode_tree, digest, encode_tree
from molehill.wire.tree import Array, Layout, Tree
from molehill_server.aggregation.lowrank import concat
from molehill_server.records import Global, LowRank, Pair


def group_of(key: Key) -> str:
    """The group a tensor is sent in: ``gate``, ``head``, or expert and factor (``e0.A``).

    Factors are apart because most policies change only one of them in a round.
    """
    return key.kind if key.expert == NO_EXPERT else f"{key.expert}.{key.kind}"


def groups(tree: Tree) -> dict[str, Tree]:
    """Split a tree into its groups."""
    names: dict[str, set[Key]] = {}
    for key in tree:
        names.setdefault(group_of(key), set()).add(key)
    return {name: tree.select(keys.__contains__) for name, keys in sorted(names.items())}


@dataclass(frozen=True)
class Blob:
    """One group as it was sent.

    Attributes:
        data: The encoded bytes.
        digest: Their digest.
        tree: What a client decodes from them.
    """

    data: bytes
    digest: str
    tree: Tree


@dataclass
class Broadcast:
    """The blobs of the current model; keeps the exchange free of older ones.

    Args:
        exchange: Where blobs are put.
        codec: How tensors are encoded.
        max_bytes: Largest blob.
        blobs: Blobs of a run that is resumed.
    """

    exchange: Exchange
    codec: MethodRef
    max_bytes: int
    blobs: dict[str, Blob] = field(default_factory=dict)
    _put: set[str] = field(default_factory=set, init=False)

    def publish(self, glob: Global) -> Global:
        """Put the groups that changed and drop those they replace.

        Patches only ever grow: what round n added to them is the group ``patch.n`` and stays as it is.

        Args:
            glob: The model after its round.

        Returns:
            The model as every client decodes it. The server goes on from this one, so both sides mean the same.
        """
        previous = self.blobs
        patches = {name: blob.tree for name, blob in previous.items() if _is_patch(name)}
        wanted = {**groups(glob.tree), **_patch_groups(glob, patches)}
        self.blobs = {name: self._encode(name, tree) for name, tree in wanted.items()}
        live = {blob.digest for blob in self.blobs.values()}
        for blob in previous.values():
            if blob.digest not in live:
                self.exchange.drop(blob.digest)
        for blob in self.blobs.values():
            if not self._has(blob.digest):
                self.exchange.put(blob.data)
        self._put = live
        return replace(glob, tree=self._tree(glob.tree.layout), patches=self._patches())

    def _has(self, name: str) -> bool:
        """Whether the exchange has a blob; what an earlier process put there may have been damaged since."""
        if name in self._put:
            return self.exchange.has(name)
        try:
            self.exchange.get(name)
        except MessageError:  # none, or one that does not fit its digest and so was removed
            return False
        return True

    def _tree(self, layout: Layout) -> Tree:
        tree = Tree(layout)
        for name, blob in self.blobs.items():
            if not _is_patch(name):
                for key, value in blob.tree.items():
                    tree[key][...] = value
        return tree

    def _patches(self) -> dict[Pair, LowRank]:
        parts: dict[Pair, list[LowRank]] = {}
        for name, blob in self.blobs.items():
            if _is_patch(name):
                for pair, part in tree_patches(blob.tree).items():
                    parts.setdefault(pair, []).append(part)
        return {pair: concat(each) for pair, each in parts.items()}

    def digests(self) -> dict[str, str]:
        """Digest of every blob by group."""
        return {name: blob.digest for name, blob in self.blobs.items()}

    @property
    def size(self) -> int:
        """Length of all blobs in bytes: what a client that has none of them fetches."""
        return sum(len(blob.data) for blob in self.blobs.values())

    def drop(self) -> None:
        """Take all blobs out of the exchange."""
        for blob in self.blobs.values():
            self.exchange.drop(blob.digest)
        self.blobs = {}

    def _encode(self, name: str, tree: Tree) -> Blob:
        old = self.blobs.get(name)
        if old is not None and old.tree.layout == tree.layout and np.array_equal(old.tree.flat, tree.flat):
            return old
        data = encode_tree(tree, self.codec)
        return Blob(data, digest(data), decode_tree(data, self.max_bytes))


def _is_patch(group: str) -> bool:
    return group.startswith("patch.")


def _patch_groups(glob: Global, held: Mapping[str, Tree]) -> dict[str, Tree]:
    """The groups that hold the accumulated patches: those sent before, and one for the ranks added since.

    When ranks were folded into fewer, what was sent before no longer adds up, and all goes into one new group.
    """
    rest = dict(glob.patches)
    for tree in held.values():
        for pair, part in tree_patches(tree).items():
            whole = rest.get(pair)
            if whole is None or not _starts_with(whole, part):
                return {f"patch.{glob.round}": patch_tree(glob.patches)}
            rest[pair] = LowRank(whole.B[:, part.rank :], whole.A[part.rank :])
    rest = {pair: patch for pair, patch in rest.items() if patch.rank}
    return {**held, f"patch.{glob.round}": patch_tree(rest)} if rest else dict(held)


def _starts_with(whole: LowRank, part: LowRank) -> bool:
    return np.array_equal(whole.A[: part.rank], part.A) and np.array_equal(whole.B[:, : part.rank], part.B)


def patch_tree(patches: Mapping[Pair, LowRank]) -> Tree:
    """Patches as one tree with the roles ``patch.A`` and ``patch.B``, for saving."""
    arrays: dict[Key, Array] = {}
    for (site, expert), patch in patches.items():
        arrays[Key(site, expert, "patch.A")] = patch.A
        arrays[Key(site, expert, "patch.B")] = patch.B
    return Tree.of(arrays)


def tree_patches(tree: Tree) -> dict[Pair, LowRank]:
    """Undo `patch_tree`."""
    sites = {(key.site, key.expert) for key in tree}
    return {pair: LowRank(tree[Key(*pair, "patch.B")], tree[Key(*pair, "patch.A")]) for pair in sorted(sites)}
