"""Partitions divide the rows, keep together what belongs together, and leak nothing into the held-out rows."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from molehill import config, registry
from molehill.errors import ConfigError, DataError
from molehill.plan import Hello
from molehill.tasks.rows import GROUP, Rows
from molehill.tasks.units import units
from molehill_simulation.data import deal, names_of
from molehill_simulation.shards import file_safe

EASY = {
    "iid": {},
    "by_column": {"column": "domain"},
    "dirichlet": {"alpha": 100.0, "min_units": 1},
    "quantity_skew": {"alpha": 1.0, "min_rows": 1},
}


def table(n, *, documents=None, texts=None, domains=("a", "b"), seed=0):
    """``n`` rows; ``documents`` and ``texts`` are from how many different ones each row's are drawn."""
    rng = np.random.default_rng(seed)
    columns = {
        "text": [f"t{i}" if texts is None else f"t{rng.integers(texts)}" for i in range(n)],
        "label": [str(rng.integers(3)) for _ in range(n)],
        "domain": [domains[i % len(domains)] for i in range(n)],
    }
    if documents is not None:
        columns[GROUP] = [
            None if rng.random() < 0.2 else f"{columns['domain'][i]}/{rng.integers(documents)}" for i in range(n)
        ]
    return Rows({k: tuple(v) for k, v in columns.items()}, tuple(f"f:{i + 1}" for i in range(n)), "f")


def shards(name, rows, clients, seed=0, **params):
    return registry.build("partitioner", name, EASY[name] | params, rows=rows, clients=clients, seed=seed)


def data(clients, name="iid", **values):
    partition = {"name": name} | EASY[name]
    return config.Data.model_validate({"clients": clients, "partition": partition} | values)


def place(row):
    return int(row.split(":")[1]) - 1


ROWS = st.builds(
    table,
    st.integers(40, 120),
    documents=st.none() | st.integers(10, 60),
    texts=st.none() | st.integers(40, 200),
    seed=st.integers(0, 1000),
)
law = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def attempt(do):
    """Try another example where documents that share sentences have grown into too few units."""
    try:
        return do()
    except DataError as error:
        if "units" not in error.what:
            raise
        return reject()


def test_all_partitioners_are_here():
    assert {method.name for method in registry.methods("partitioner")} == set(EASY)


@pytest.mark.parametrize("name", EASY)
@law
@given(rows=ROWS, clients=st.integers(1, 6), seed=st.integers(0, 9))
def test_every_row_to_one_client(name, rows, clients, seed):
    dealt = attempt(lambda: shards(name, rows, clients, seed))
    assert len(dealt) == clients
    assert len({shard.name.casefold() for shard in dealt}) == clients
    assert sorted(i for shard in dealt for i in shard.indices) == list(range(len(rows)))
    assert all(shard.indices for shard in dealt)
    assert shards(name, rows, clients, seed) == dealt
    client = {i: shard.name for shard in dealt for i in shard.indices}
    together = [{client[i] for i in unit} for unit in units(rows)]
    if name != "by_column":
        assert all(len(names) == 1 for names in together)
    elif GROUP in rows.columns and clients >= 2:
        # A text may occur in both domains, so only documents (which lie in one) must be whole.
        at = {}
        for i, group in enumerate(rows[GROUP]):
            assert group is None or at.setdefault(group, client[i]) == client[i]


@pytest.mark.parametrize("name", EASY)
@law
@given(rows=ROWS, clients=st.integers(1, 5), seed=st.integers(0, 9), fraction=st.floats(0.1, 0.9))
def test_nothing_leaks(name, rows, clients, seed, fraction):
    dealt = attempt(lambda: deal(data(clients, name, test_fraction=fraction), rows, seed))
    side = {}
    for client in dealt:
        assert len(client.train) > 0
        assert len(client.test) > 0
        for part in (client.train, client.test):
            for where in part.where:
                assert place(where) not in side
                side[place(where)] = part is client.test
    assert sorted(side) == list(range(len(rows)))
    for unit in units(rows):  # on whichever clients the rows of a unit are
        assert len({side[i] for i in unit}) == 1
    again = deal(data(clients, name, test_fraction=fraction), rows, seed)
    assert [(c.name, c.train.where, c.test.where) for c in again] == [
        (c.name, c.train.where, c.test.where) for c in dealt
    ]


@pytest.mark.parametrize("name", EASY)
def test_twins_are_on_one_side(name):
    more = {"min_rows": 20} if name == "quantity_skew" else {}
    ways = (str.upper, "\u201c{}!\u201d".format, str.title, " {}\u00a0...".format)
    texts = [f"word{i // 2} of them" for i in range(160)]
    texts = [ways[(i % 2) * (1 + i // 2 % 3)](text) for i, text in enumerate(texts)]
    assert len(set(texts)) == 160
    rows = table(160).having(text=texts)
    for seed in range(3):
        dealt = deal(data(3, name, partition={"name": name, **EASY[name], **more}), rows, seed)
        train, test = ({place(w) // 2 for c in dealt for w in getattr(c, part).where} for part in ("train", "test"))
        assert not train & test
        assert len(train) + len(test) == 80


@law
@given(n=st.integers(60, 200), fraction=st.floats(0.2, 0.8), seed=st.integers(0, 99))
def test_labels_are_stratified(n, fraction, seed):
    (client,) = deal(data(1, test_fraction=fraction), table(n, seed=seed), seed)
    total = Counter(client.train["label"]) + Counter(client.test["label"])
    for label, count in total.items():
        assert abs(Counter(client.test["label"])[label] - fraction * count) <= 0.5 + 1e-9


def test_by_column_names_and_sizes():
    rows = table(100, domains=("nyt", "a b/c", "a:b/c", "x"))
    dealt = shards("by_column", rows, 8)
    names = ["a-b-c-1", "a-b-c-2", "a-b-c-1_2", "a-b-c-2_2", "nyt-1", "nyt-2", "x-1", "x-2"]
    assert [shard.name for shard in dealt] == names
    assert {len(shard.indices) for shard in dealt} == {12, 13}
    assert all(len({rows["domain"][i] for i in shard.indices}) == 1 for shard in dealt)
    assert [shard.name for shard in shards("by_column", rows, 4)] == ["a-b-c", "a-b-c_2", "nyt", "x"]


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_by_column_needs_an_owner_for_every_row(nothing):
    with pytest.raises(DataError, match="the row has no 'domain'"):
        shards("by_column", table(40, domains=("none", nothing)), 2)


def test_by_column_with_clients_to_spare_and_to_want():
    rows = table(90, domains=("a", "b", "b"))
    assert [shard.name for shard in shards("by_column", rows, 3)] == ["a", "b-1", "b-2"]
    rows = table(90, domains=("a", "b", "c", "c"))
    dealt = shards("by_column", rows, 2)
    assert [shard.name for shard in dealt] == ["client-1", "client-2"]
    assert sorted(sorted({rows["domain"][i] for i in shard.indices}) for shard in dealt) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("Klinik S\u00fcd", "Klinik-S\u00fcd"),
        ("Klinik Su\u0308d", "Klinik-S\u00fcd"),
        ("\u75c5\u9662", "\u75c5\u9662"),
        (
            "\u0905\u0938\u094d\u092a\u0924\u093e\u0932",
            "\u0905\u0938\u094d\u092a\u0924\u093e\u0932",
        ),  # marks between letters
        ("\U0001f3e5", "hospital"),
        ("!?", "exclamation-mark-question-mark"),
        ("../a\x1b[2J/b", "a-2J-b"),
        ("_x", "x"),
        ("none", "none"),
        ("", "none"),
        ("x" * 60, "x" * 40),
    ],
)
def test_names_of_owners_in_any_script(value, name):
    assert file_safe(value) == name
    hello = Hello(client=name, n_train=1, n_test=1, version="1")
    assert hello.client == name


def test_no_two_owners_share_a_folder():
    domains = (
        "Ward",
        "ward",
        "WARD",
        "\u00fc",
        "u\u0308",
        "\uff41",
        "a",
        "Stra\u00dfe",
        "STRASSE",
        "\U0001f3e5",
        "hospital",
    )
    dealt = deal(data(len(domains), "by_column"), table(220, domains=domains), 0)
    folded = {unicodedata.normalize("NFKC", client.name).casefold() for client in dealt}
    assert len(folded) == len(domains)
    assert {client.owner for client in dealt} == set(domains)
    told = names_of(dealt)
    assert set(told.values()) < set(domains)
    assert all(client.name in told or client.name == client.owner for client in dealt)
    assert names_of(deal(data(4, "by_column"), table(100), 0)) == {}  # a-1, a-2, b-1, b-2 are plain enough


def test_iid_sizes():
    assert sorted(len(shard.indices) for shard in shards("iid", table(100), 7)) == [14] * 5 + [15] * 2
    assert shards("iid", table(100), 7, seed=1) != shards("iid", table(100), 7, seed=2)


def test_iid_gives_the_names_that_it_is_given():
    named = shards("iid", table(100), 2, names=["late", "later"])
    assert [shard.name for shard in named] == ["late", "later"]
    assert [shard.indices for shard in named] == [shard.indices for shard in shards("iid", table(100), 2)]
    for names in (["late"], ["late", "late"]):
        with pytest.raises(ConfigError, match=r"data\.partition\.names: different names: 1, for 2 clients"):
            shards("iid", table(100), 2, names=names)


def skew(dealt, rows):
    """Mean largest share of a label within a client."""
    counts = [Counter(rows["label"][i] for i in shard.indices) for shard in dealt]
    return float(np.mean([max(count.values()) / count.total() for count in counts]))


def test_dirichlet_is_skewed_by_its_alpha():
    rows = table(3000)
    even, uneven = (shards("dirichlet", rows, 6, alpha=alpha) for alpha in (1000.0, 0.1))
    assert skew(even, rows) < 0.4
    assert skew(uneven, rows) > 0.6
    assert min(len(shard.indices) for shard in shards("dirichlet", rows, 6, alpha=0.5, min_units=100)) >= 100
    assert skew(shards("quantity_skew", rows, 6, alpha=0.3, min_rows=100), rows) < 0.5


def test_quantity_is_skewed_by_its_alpha():
    def largest(alpha):
        return max(len(shard.indices) for shard in shards("quantity_skew", table(1000), 5, alpha=alpha))

    assert largest(1e6) <= 202
    assert largest(0.1) > 500
    assert min(len(s.indices) for s in shards("quantity_skew", table(1000), 5, alpha=0.05, min_rows=20)) >= 19


def test_caps_keep_the_mix_of_labels():
    labels = ["x"] * 600 + ["y"] * 300 + ["z"] * 100
    rows = Rows({"text": tuple(map(str, range(1000))), "label": tuple(labels)}, tuple(map(str, range(1000))), "f")
    (client,) = deal(data(1, rows=50, test_rows=20), rows, 0)
    assert Counter(client.train["label"]) == {"x": 30, "y": 15, "z": 5}
    assert Counter(client.test["label"]) == {"x": 12, "y": 6, "z": 2}


def test_rows_without_labels_are_dealt():
    n = 40
    rows = Rows({"instruction": tuple(map(str, range(n))), "output": ("o",) * n}, tuple(map(str, range(n))), "f")
    assert [(len(c.train), len(c.test)) for c in deal(data(2), rows, 0)] == [(15, 5)] * 2


def test_rows_that_another_client_holds_out_count_towards_the_fraction():
    texts = [f"t{i}" for i in range(100)] + [f"t{i}" for i in range(200)]
    columns = {"text": tuple(texts), "label": ("x",) * 300, "domain": ("a",) * 100 + ("b",) * 200}
    rows = Rows(columns, tuple(map(str, range(300))), "f")
    a, b = deal(data(2, "by_column"), rows, 0)
    assert (len(a.test), len(b.test)) == (25, 50)
    assert set(a.test["text"]) <= set(b.test["text"])


def test_few_rows_still_have_both_sides():
    for fraction in (0.01, 0.99):
        (client,) = deal(data(1, test_fraction=fraction), table(3), 0)
        assert len(client.train) >= 1
        assert len(client.test) >= 1


@pytest.mark.parametrize(
    ("rows", "settings_", "message"),
    [
        (table(3), data(4), r"3 rows for 4 clients.*Lower data.clients"),
        (table(4), data(4), r"client 'client-1' has 1 rows in 1 units: none to hold out"),
        (table(50, texts=1), data(2), r"50 rows make 1 units.*fewer than the 2 clients"),
        (table(20, domains=("a",) * 18 + ("b", "b"), texts=None), data(40, "by_column"), r"20 rows for 40 clients"),
        (table(20).having(domain=["a"] * 19 + [None]), data(2, "by_column"), r"f:20: the row has no 'domain'"),
        (
            table(20),
            data(2, partition={"name": "by_column", "column": "author"}),
            r"no column 'author'.*domain\. Name one in data\.partition",
        ),
        (
            table(20),
            data(2, partition={"name": "dirichlet", "column": "author"}),
            r"no column 'author'.*domain\. Name one in data\.partition",
        ),
        (table(20), data(3, partition={"name": "dirichlet", "min_units": 10}), r"fewer than 10 units.*Raise alpha"),
        (table(20), data(3, partition={"name": "quantity_skew"}), r"20 rows are too few for 3 clients of at least 10"),
    ],
)
def test_bad_deals(rows, settings_, message):
    with pytest.raises(DataError, match=message):
        deal(settings_, rows, 0)


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew"])
def test_bad_alpha(name):
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        registry.parse_params("partitioner", name, {"alpha": 0.0})
