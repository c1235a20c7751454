"""What `molehill check` tells of every client."""

from __future__ import annotations

from rich.console import Console

from molehill.config import Task
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.rows import Rows
from molehill_simulation.census import ClientFacts, Tokens, census, census_table, lacking
from molehill_simulation.data import ClientRows
from molehill_simulation.few import MOST


def printed(clients):
    console = Console(width=200)
    with console.capture() as capture:
        for part in census_table(clients):
            console.print(part)
    return capture.get()


def rows(*labels):
    where = tuple(f"rows:{number}" for number in range(len(labels)))
    return Rows({"text": ("word",) * len(labels), "label": labels}, where, "rows")


def facts(name, count=10, classes=None, tokens=None):
    return ClientFacts(name, count, 2, classes or {}, tokens)


def test_rows_classes_and_lengths_of_a_client_are_those_it_trains_on_and_holds_out():
    owner = ClientRows("shop", rows("bad", "good", "bad"), rows("good"))
    lengths = [Examples([], Lengths((4, 9, 5), 8, 1, 2), []), Examples([], Lengths((7,), 8), [])]
    (found,) = census([owner], Task(labels=("bad", "fair", "good")), [tuple(lengths)])
    assert (found.rows, found.held_out, found.classes) == (3, 1, {"bad": 2, "fair": 0, "good": 2})
    assert found.tokens == Tokens(median=5, most=9, longest=9, cut=1, lost=1, unlearnt=2)
    assert lacking([found, facts("all", classes={"bad": 1, "fair": 1, "good": 1})]) == "fair at 1 client"


def test_shares_are_of_what_has_classes_which_may_be_more_than_rows():
    assert {"75%", "25%"} <= set(printed([facts("shop", 2, {"person": 30, "place": 10})]).split())


def test_few_classes_have_a_column_and_of_many_the_largest_are_named():
    few = printed([facts("shop", 6, {"bad": 6, "good": 2}, Tokens(4, 9, 9, 3, 1, 0))])
    heads, _, cells = (line.split() for line in few.splitlines() if line.strip())
    assert heads == ["client", "rows", "held", "out", "bad", "good", "tokens:", "half", "95%", "longest", "cut", "lost"]
    assert cells == ["shop", "6", "2", "75%", "25%", "4", "9", "9", "3", "1"]
    many = printed([facts("shop", 14, {**{str(n): n for n in range(1, 6)}, "none": 0, "x": 1})])
    assert "5 31%, 4 25%, 3 19%, 3 more" in many
    assert "none" not in many


def test_of_very_many_clients_so_many_are_shown_that_the_fewest_and_the_most_rows_are_there():
    shown = printed([facts(f"c{n}", 1 + (7 * n) % 999) for n in range(999)])
    assert f"{MOST} of 999 clients are shown" in shown
    assert len([line for line in shown.splitlines() if line.strip().startswith("c")]) == MOST + 1  # and the head
    assert {" c0 ", " c428 "} <= {f" {line.split()[0]} " for line in shown.splitlines() if line.strip()}


def test_names_of_clients_and_classes_do_nothing_to_a_terminal():
    assert "\x1b]" not in printed([facts("\x1b]0;x\x07shop", classes={"\x1b]0;bad": 1, "good": 11})])
