from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from molehill import registry
from molehill.errors import ConfigError, MessageError
from molehill.wire import positions
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import Segments
from molehill.wire.tree import Layout, Tree

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("fp16", {}),
    ("fp16", {"zstd": True}),
    ("bf16", {}),
    ("bf16", {"zstd": True}),
    ("int8", {}),
    ("int8", {"zstd": True}),
    ("int4", {}),
    ("int4", {"group": 8, "zstd": False}),
    ("compeft", {}),
    ("compeft", {"density": 0.5, "positions": "mask"}),
    ("compeft", {"density": 0.05, "positions": "gap"}),
    ("compeft", {"density": 0.3, "positions": "golomb", "over": "tree"}),
    ("compeft", {"density": 1.0, "scale": "std", "alpha": 2.0}),
]
EXACTLY_REPEATING = [v for v in VARIANTS if v[1].get("scale") != "std"]

moderate = st.floats(-1e6, 1e6, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=9), elements=moderate)
names = st.builds(Key, st.sampled_from(["a.0.q", "a.1.q", "head"]), st.sampled_from(["e0", "e1", "-"]), st.just("A"))
trees = st.dictionaries(names, arrays, max_size=4).map(Tree.of)
variants = pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)


def build(name: str, params: dict[str, Any]) -> Any:
    return registry.build("codec", name, params)


def through(codec: Any, tree: Tree) -> Tree:
    return codec.decode(codec.encode(tree), tree.layout)


def relative(bits: int, floor: float = 0.0):
    """At most this relative error, or this fraction of the largest value."""

    def bound(tree: Tree, got: Tree):
        sizes = np.abs(tree.flat).astype(np.float64)
        return np.abs(got.flat - tree.flat) <= np.maximum(sizes * 2.0**-bits, sizes.max(initial=0) * floor)

    return bound


def half_a_step(most: int, runs):
    def bound(tree: Tree, got: Tree):
        segments = runs(tree.layout)
        steps = segments.peaks(tree.flat).astype(np.float64) / most
        floor = steps.max(initial=0) * 2.0**-28 * most  # runs that far below the largest become 0
        return np.abs(got.flat - tree.flat) <= np.maximum(segments.spread(steps) * (0.5 + 2.0**-8), floor)

    return bound


BOUNDS = {
    "fp32": lambda tree, got: got.flat == tree.flat,
    "fp16": relative(11, 2.0**-39),
    "bf16": relative(8),
    "int8": half_a_step(127, Segments.rows),
}


def test_every_registered_codec_is_tested() -> None:
    assert {method.name for method in registry.methods("codec")} == {name for name, _ in VARIANTS}


@variants
@given(tree=trees)
@settings(max_examples=25)
def test_names_shapes_and_the_error_bound_survive(name: str, params: dict[str, Any], tree: Tree) -> None:
    codec = build(name, params)
    before = tree.copy()
    got = through(codec, tree)
    assert got.layout == tree.layout
    assert got.flat.dtype == np.float32
    assert tree.digest == before.digest, "the argument was changed"
    assert isinstance(codec, Codec)
    if name == "int4":
        bound = half_a_step(7, lambda layout: Segments.groups(layout, params.get("group", 64)))
    else:
        bound = BOUNDS.get(name, lambda tree, got: got.flat == got.flat)
    assert bound(tree, got).all()


@pytest.mark.parametrize(("name", "params"), EXACTLY_REPEATING, ids=str)
@given(tree=trees)
@settings(max_examples=25)
def test_encoding_what_was_decoded_gives_the_same(name: str, params: dict[str, Any], tree: Tree) -> None:
    codec = build(name, params)
    once = through(codec, tree)
    assert through(codec, once).flat.tolist() == once.flat.tolist()
    assert codec.encode(through(codec, once)) == codec.encode(once)


@variants
def test_a_codec_without_feedback_ignores_memory(name: str, params: dict[str, Any], heavy: Tree) -> None:
    codec = build(name, params)
    memory: dict = {}
    assert codec.encode(heavy, memory) == codec.encode(heavy)
    assert bool(memory) == codec.feedback


@variants
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(
    name: str, params: dict[str, Any], bad: float, small: Tree
) -> None:
    small[Key("layer.0.query", "e0", "B")][1, 0] = bad
    memory: dict = {}
    with pytest.raises(MessageError, match=r"layer\.0\.query/e0/B"):
        build(name, params).encode(small, memory)
    assert not memory


@variants
@pytest.mark.parametrize("size", [1e38, 1e-30, 1e-44])
def test_extreme_magnitudes(name: str, params: dict[str, Any], size: float) -> None:
    tree = Tree.of({Key("s", "e0", "A"): np.array([[size, -size], [size, size]], np.float32)})
    got = through(build(name, params), tree).flat.astype(np.float64) / size
    if size > 1e-40 and name != "compeft":
        assert np.allclose(got, [1, -1, 1, 1], rtol=2**-8)
    else:  # so few bits are left of 1e-44 that a codec may lose it, but not blow it up
        assert (np.abs(got) <= 2 * params.get("alpha", 1)).all()


@variants
def test_truncated_or_lengthened_payloads_are_refused(name: str, params: dict[str, Any], small: Tree) -> None:
    codec = build(name, params)
    payload = codec.encode(small)
    for end in range(len(payload)):
        with pytest.raises(MessageError):
            codec.decode(payload[:end], small.layout)
    if name != "compeft" or params.get("positions") in ("mask", "gap"):
        with pytest.raises(MessageError):
            codec.decode(payload + b"\0", small.layout)


@variants
@given(data=st.data())
@settings(max_examples=60)
def test_forged_payloads_end_in_a_message_error_or_a_finite_tree(name: str, params: dict[str, Any], data) -> None:
    codec = build(name, params)
    layout = Layout({Key("s", "e0", "A"): (3, 5), Key("s", "e0", "B"): (7, 3)})
    tree = Tree(layout, np.linspace(-1, 2, layout.size, dtype=np.float32))
    payload = bytearray(codec.encode(tree))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255)), max_size=4)
    ):
        payload[place] = value
    for forged in (bytes(payload), data.draw(st.binary(max_size=80))):
        try:
            assert np.isfinite(codec.decode(memoryview(forged), layout).flat).all()
        except MessageError:
            continue


def test_bf16_rounds_to_nearest_even() -> None:
    key = Key("s", "-", "dense")
    given_bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000], np.uint32)
    want_bits = np.array([0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000, 0xBF800000], np.uint32)
    got = through(build("bf16", {}), Tree.of({key: given_bits.view(np.float32)}))
    assert got.flat.view(np.uint32).tolist() == want_bits.tolist()


def test_bf16_refuses_what_would_become_infinite() -> None:
    tree = Tree.of({Key("s", "-", "a"): np.float32(1), Key("s", "-", "b"): np.float32(3.4e38)})
    with pytest.raises(MessageError, match="s/-/b"):
        build("bf16", {}).encode(tree)


def test_fp16_keeps_small_steps_precise() -> None:
    # Plain float16 keeps 1e-6 to 3 % only.
    tree = Tree.of({Key("s", "-", "a"): np.array([1.234e-6, 9.87e-7, 5e-4], np.float32)})
    assert np.allclose(through(build("fp16", {}), tree).flat, tree.flat, rtol=2**-11, atol=0)


def test_int4_groups_do_not_cross_tensors() -> None:
    arrays = {Key("s", "e0", "A"): np.full(3, 1e-6, np.float32), Key("s", "e0", "B"): np.full(3, 1.0, np.float32)}
    assert np.allclose(through(build("int4", {}), Tree.of(arrays)).flat, [1e-6] * 3 + [1] * 3, rtol=1e-3)


def test_int4_is_eight_times_smaller_at_cosine_99() -> None:
    rng = np.random.default_rng(0)
    tree = Tree.of({Key(f"s{i}", "e0", "A"): 1e-3 * rng.standard_normal((8, 1024), np.float32) for i in range(12)})
    codec = build("int4", {})
    got = through(codec, tree)
    assert tree.flat.nbytes / len(codec.encode(tree)) >= 8
    assert got.flat @ tree.flat / np.linalg.norm(got.flat) / np.linalg.norm(tree.flat) >= 0.99


@pytest.mark.parametrize(("over", "groups"), [("tensor", True), ("tree", False)])
@pytest.mark.parametrize("scale", ["mean", "std"])
def test_compeft_is_sign_times_scale_of_the_largest(over: str, groups: bool, scale: str, heavy: Tree) -> None:
    # An independent reference: sort everything, keep the head, one loop per tensor.
    density, alpha = 0.2, 1.3
    order = np.argsort(-np.abs(heavy.flat), kind="stable")[: round(density * heavy.layout.size)]
    kept = Tree(heavy.layout)
    kept.flat[order] = 1
    want = Tree(heavy.layout)

    def value(numbers: np.ndarray, mask: np.ndarray) -> float:
        chosen = np.abs(numbers[mask > 0].astype(np.float64))
        base = numbers.astype(np.float64).std() if scale == "std" else chosen.mean() if chosen.size else 0.0
        return alpha * base

    whole = value(heavy.flat, kept.flat)
    for key in heavy:
        want[key][...] = np.sign(heavy[key]) * kept[key] * (value(heavy[key], kept[key]) if groups else whole)
    got = through(build("compeft", {"density": density, "alpha": alpha, "scale": scale, "over": over}), heavy)
    assert np.allclose(got.flat, want.flat, rtol=1e-6, atol=0)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("way", ["golomb", "auto"])
def test_compeft_size_is_near_the_entropy(density: float, way: str) -> None:
    n = 400_000
    flat = np.random.default_rng(3).standard_normal(n, np.float32)
    tree = Tree.of({Key("s", "e0", "A"): flat})
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    payload = build("compeft", {"density": density, "positions": way}).encode(tree)
    assert len(payload) <= n * (entropy + density) / 8 * 1.05 + 32


@pytest.mark.parametrize("way", ["mask", "gap", "golomb"])
def test_the_three_ways_to_write_positions_agree_and_auto_is_the_shortest(way: str, heavy: Tree) -> None:
    heavy.flat[3000:9000] = 0  # a gap above one byte
    auto, one = build("compeft", {}), build("compeft", {"positions": way})
    assert through(auto, heavy).digest == through(one, heavy).digest
    assert len(auto.encode(heavy)) <= len(one.encode(heavy))


@given(mask=st.lists(st.booleans(), max_size=200))
def test_golomb_codes_never_take_more_than_their_bound(mask: list[bool]) -> None:
    places = np.array(mask, bool)
    coded = memoryview(positions.encode(places, "golomb"))
    assert positions.decode(coded, int(places.sum()), len(mask)).tolist() == mask


def test_golomb_codes_that_are_too_long_are_refused_before_they_are_unpacked() -> None:
    coded = memoryview(positions.encode(np.ones(64, bool), "golomb") + bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="at most 8"):
            positions.decode(coded, 64, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


def test_compeft_keeps_exactly_the_density_with_ties_and_never_a_zero() -> None:
    key = Key("s", "e0", "A")
    codec = build("compeft", {"density": 0.5})
    assert through(codec, Tree.of({key: np.ones(10, np.float32)})).flat.tolist() == [1] * 5 + [0] * 5
    sparse = np.zeros(10, np.float32)
    sparse[[2, 7]] = [-3, 3]
    assert through(codec, Tree.of({key: sparse})).flat.tolist() == sparse.tolist()
    assert not through(codec, Tree.of({key: np.zeros(10, np.float32)})).flat.any()


@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.05, 0.2, 0.5]))
@settings(max_examples=15)
def test_feedback_accounts_for_everything(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    codec = build("compeft", {"density": density})
    layout = Layout({Key("s", "e0", "A"): (4, 30), Key("s", "e0", "B"): (30, 4)})
    memory: dict = {}
    sent, arrived = np.zeros(layout.size), np.zeros(layout.size)
    for _ in range(20):
        tree = Tree(layout, rng.standard_t(3, layout.size).astype(np.float32))
        sent += tree.flat
        arrived += codec.decode(codec.encode(tree, memory), layout).flat
    left = np.concatenate([memory[key].ravel() for key in layout])
    assert np.allclose(arrived + left, sent, atol=1e-4)


def test_with_feedback_the_mean_of_what_arrives_approaches_what_is_sent(heavy: Tree) -> None:
    codec = build("compeft", {"density": 0.2})

    def error(rounds: int, memory: dict | None) -> float:
        total = sum(codec.decode(codec.encode(heavy, memory), heavy.layout).flat for _ in range(rounds))
        return float(np.linalg.norm(total / rounds - heavy.flat) / np.linalg.norm(heavy.flat))

    assert error(20, {}) < 0.5 * error(20, None)
    assert error(80, {}) < 0.8 * error(20, {})


def test_memory_of_other_tensors_stays_and_another_rank_is_refused(small: Tree) -> None:
    codec = build("compeft", {})
    other = Key("elsewhere", "e0", "A")
    memory = {other: np.ones(3, np.float32)}
    codec.encode(small, memory)
    assert set(memory) == {other, *small}
    assert memory[other].tolist() == [1, 1, 1]
    memory[Key("head", "-", "head.bias")] = np.ones(4, np.float32)
    with pytest.raises(MessageError, match=r"head/-/head.bias: what is left unsent has shape \[4\]"):
        codec.encode(small, memory)


@pytest.mark.parametrize(
    ("name", "params"),
    [("compeft", {"density": 0}), ("compeft", {"density": 1.5}), ("compeft", {"alpha": -1}), ("int4", {"group": 4}),
     ("compeft", {"positions": "huffman"}), ("fp16", {"level": 3}), ("fp32", {"zstd": True}), ("int3", {})],
)  # fmt: skip
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(name, params)


@pytest.mark.parametrize("name", [method.name for method in registry.methods("codec")])
def test_a_codec_is_exact_if_and_only_if_it_says_so(name: str) -> None:
    tree = Tree.of({Key("site", "e0", "A"): np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)})
    codec = build(name, {})
    assert np.array_equal(codec.decode(codec.encode(tree), tree.layout).flat, tree.flat) is codec.exact
