"""Batches waste little, lose nothing and depend on their seed alone."""

from __future__ import annotations

from itertools import islice, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import config
from molehill.errors import DataError
from molehill.tasks.batches import IGNORE, Batches, Example, alike, eval_batches, join, pad
from molehill.tasks.classification import Classification
from molehill.tasks.kind import make_task
from molehill.tasks.rows import TASK, Rows


class Padder:
    def collate(self, examples):
        return pad(examples, 0)


def examples(lengths):
    return [Example([i + 1] * length, i) for i, length in enumerate(lengths)]


LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=80)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_a_pass_holds_no_row_twice(lengths, size, seed):
    size = min(size, len(lengths))
    passes = len(lengths) // size
    order = list(islice(Batches(examples(lengths), size, seed, Padder()).order(), 2 * passes))
    for one in (order[:passes], order[passes:]):
        rows = [i for batch in one for i in batch]
        assert all(len(batch) == size for batch in one)
        assert len(set(rows)) == len(rows)
        assert len(lengths) - len(rows) < size
    assert order == list(islice(Batches(examples(lengths), size, seed, Padder()).order(), 2 * passes))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20))
def test_evaluation_holds_every_row_once(lengths, size):
    batches = list(eval_batches(examples(lengths), size, Padder(), 30))
    assert sorted(i for batch in batches for i in batch.labels.tolist()) == list(range(len(lengths)))
    assert max(len(batch) for batch in batches) <= size
    sizes = [batch.input_ids.numel() for batch in batches]
    assert sizes == sorted(sizes, reverse=True)  # what is too large for memory fails at once


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 40), st.integers(1, 7))
def test_no_other_cut_costs_less(lengths, start, most):
    def cost(passes):
        return sum(start + len(some) * max(some) for some in passes)

    ordered = sorted(lengths)
    ways = []
    for cuts in product((False, True), repeat=len(lengths) - 1):
        passes = [ordered[:1]]
        for length, cut in zip(ordered[1:], cuts, strict=True):
            passes += [[length]] if cut else [[*passes.pop(), length]]
        ways += [cost(passes)] if max(map(len, passes)) <= most else []
    found = alike(lengths, start, most)
    assert sorted(i for some in found for i in some) == list(range(len(lengths)))
    assert max(map(len, found)) <= most
    assert cost([[lengths[i] for i in some] for some in found]) == min(ways)


def test_batches_are_full_where_a_pass_costs_more_than_padding():
    assert alike([3, 1, 2, 9, 5], 1e9, 2) == [[3], [4, 0], [2, 1]]


def test_every_row_is_met_in_time():
    order = Batches(examples([5] * 10), 4, 0, Padder()).order()
    assert {i for batch in islice(order, 40) for i in batch} == set(range(10))


def test_fewer_rows_than_a_batch():
    batch = next(iter(Batches(examples([3, 9]), 32, 0, Padder())))
    assert sorted(batch.labels.tolist()) == [0, 1]


def test_buckets_pad_less_and_stay_random():
    lengths = np.random.default_rng(0).integers(5, 120, 512).tolist()

    def waste(batches):
        return sum(b.input_ids.numel() for b in batches) / sum(int(b.attention_mask.sum()) for b in batches)

    bucketed = list(islice(Batches(examples(lengths), 32, 0, Padder()), 16))
    in_order = [pad(examples(lengths)[i : i + 32], 0) for i in range(0, 512, 32)]
    assert waste(bucketed) < 1.12
    assert waste(in_order) > 1.5
    means = [batch.input_ids.shape[1] for batch in bucketed]
    assert means not in (sorted(means), sorted(means, reverse=True))
    other = next(iter(Batches(examples(lengths), 32, 1, Padder())))
    assert other.labels.tolist() != bucketed[0].labels.tolist()


def test_padding():
    batch = pad([Example([5, 6, 7], 1, 0), Example([8], 0, 2)], 9)
    assert batch.input_ids.shape == (2, 3)
    assert batch.input_ids[1].tolist() == [8, 9, 9]
    assert batch.attention_mask.dtype == torch.bool
    assert batch.attention_mask.sum(1).tolist() == [3, 1]
    assert batch.labels.tolist() == [1, 0]
    assert batch.task_ids.tolist() == [0, 2]
    per_token = pad([Example([5, 6], [IGNORE, 6]), Example([7], [IGNORE])], 0)
    assert per_token.labels.tolist() == [[IGNORE, 6], [IGNORE, IGNORE]]
    assert per_token.task_ids is None is per_token.domain_ids
    domains = pad([Example([5, 6, 7], 1, domain=2), Example([8], 0, domain=-1)], 9)
    assert domains.domain_ids.tolist() == [[2, 2, 2], [-1, -1, -1]]
    assert join([domains, pad([Example([1] * 4, 0, domain=0)], 9)]).domain_ids[:, 3].tolist() == [-1, -1, 0]
    assert pad([Example([5], 1, domain=2), Example([8], 0)], 9).domain_ids is None
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)


def rows(**columns):
    n = len(next(iter(columns.values())))
    return Rows({k: tuple(v) for k, v in columns.items()}, tuple(f"f:{i + 1}" for i in range(n)), "f")


def test_classification_encodes(tokenizer):
    task = make_task(config.Task(labels=("x", "y"), max_length=8), tokenizer)
    assert isinstance(task, Classification)
    found = task.encode(rows(text=["a b", "c " * 20], label=["y", "x"], **{TASK: [1, 0]}))
    assert [len(e.input_ids) for e in found] == [2, 8]
    assert [e.labels for e in found] == [1, 0]
    batch = task.collate(found)
    assert batch.input_ids.shape == (2, 8)
    assert batch.input_ids[0, 2] == tokenizer.pad_token_id
    assert batch.task_ids.tolist() == [1, 0]
    assert task.encode(rows(text=["a"], label=["y"]).take([])) == []


def test_text_without_tokens(tokenizer):
    task = Classification(tokenizer, ("x",), 8)
    with pytest.raises(DataError, match="f:1: the text has no tokens"):
        task.encode(rows(text=["\u00a0"], label=["x"]))
