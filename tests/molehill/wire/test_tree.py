from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree

parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
keys = st.builds(Key, parts, parts | st.just("-"), parts)
shapes = st.dictionaries(keys, st.lists(st.integers(1, 5), max_size=3).map(tuple), max_size=6)


@given(keys)
def test_a_name_parses_to_its_key(key: Key) -> None:
    assert Key.parse(key.name) == key


@pytest.mark.parametrize("name", ["", "a/b", "a/b/c/d", "a//c", "/b/c", "a b/e0/A", "../e0/A", "a/e0/A\n", "a" * 600])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(MessageError):
        Key.parse(name)


@given(shapes, st.randoms())
def test_a_layout_does_not_depend_on_order(named: dict, random) -> None:
    items = list(named.items())
    random.shuffle(items)
    one, two = Layout(named), Layout(dict(items))
    assert one == two
    assert one.digest == two.digest
    assert list(one) == sorted(named)


@given(shapes)
def test_spans_tile_the_flat_vector(named: dict) -> None:
    layout = Layout(named)
    covered = np.zeros(layout.size, int)
    for key in layout:
        covered[layout.span(key)] += 1
    assert (covered == 1).all()


def test_digests_tell_names_shapes_and_values_apart() -> None:
    key = Key("s", "e0", "A")
    layouts = [Layout({key: (2, 3)}), Layout({key: (3, 2)}), Layout({key._replace(role="B"): (2, 3)}), Layout({})]
    assert len({layout.digest for layout in layouts}) == 4
    assert Layout({}).digest == hashlib.sha256(b"").hexdigest()
    tree = Tree(layouts[0])
    other = tree.copy()
    other[key][0, 0] = 1
    assert tree.digest != other.digest


def test_a_tree_is_views_of_one_vector() -> None:
    tree = Tree(Layout({Key("s", "e0", "A"): (2, 3), Key("s", "e0", "B"): (3, 2)}))
    tree.flat[:] = np.arange(12)
    assert tree[Key("s", "e0", "B")].tolist() == [[6, 7], [8, 9], [10, 11]]
    tree[Key("s", "e0", "A")][1, 2] = 50
    assert tree.flat[5] == 50


@given(shapes)
def test_select_of_everything_changes_nothing(named: dict) -> None:
    tree = Tree(Layout(named))
    tree.flat[:] = np.arange(tree.layout.size)
    assert tree.select(lambda _: True).digest == tree.digest
    assert Tree.of(tree).digest == tree.digest


def test_select_keeps_values() -> None:
    tree = Tree(Layout({Key("s", "e0", "A"): (2,), Key("s", "e1", "A"): (2,)}))
    tree.flat[:] = [1, 2, 3, 4]
    assert tree.select(lambda key: key.expert == "e1").flat.tolist() == [3, 4]


def test_a_vector_of_the_wrong_length_or_type_is_refused() -> None:
    layout = Layout({Key("s", "e0", "A"): (2, 3)})
    for flat in (np.zeros(5, np.float32), np.zeros(6, np.float64), np.zeros((2, 3), np.float32)):
        with pytest.raises(MessageError, match="layout needs"):
            Tree(layout, flat)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    tree = Tree(Layout({Key("s", "e0", "A"): (2,), Key("s", "e0", "B"): (2,)}))
    assert tree.require_finite() is tree
    tree[Key("s", "e0", "B")][1] = bad
    with pytest.raises(MessageError, match="s/e0/B"):
        tree.require_finite()
