"""What `molehill check` says of memory: tensors are counted as they come and go, and a large batch follows from two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_world
import torch

from molehill.tasks.adapted import open_model
from molehill.tasks.lengths import together
from molehill.tasks.schema import load_rows
from molehill_simulation.data import deal
from molehill_simulation.engine import machine_of
from molehill_simulation.memory import Memory, Peak, memory
from molehill_simulation.rehearsal import rehearsal

MEMORY = Memory(
    device="cpu",
    processes=2,
    lead=1,
    base=1000,
    adapter=10,
    optimiser=20,
    activations=30,
    rest=500,
    shared=300,
    step="",
    total=10_000,
    free=5000,
)


def test_tensors_count_while_they_live_and_what_was_there_does_not():
    there = torch.zeros(1000)
    peak = Peak([there])
    with peak:
        one = there + 1
        view = one.view(10, 100)[3:]
        there.add_(1)
        assert (peak.live, peak.most) == (4000, 4000)
        two = one * 2
        assert (peak.live, peak.most) == (8000, 8000)
        del one
        assert peak.live == 8000  # the view keeps it
        del view, two
        assert (peak.live, peak.most) == (0, 8000)


def test_processes_have_files_in_common_and_nothing_else():
    assert MEMORY.needed == 300 + 3 * (1000 + 500 - 300) + 2 * (10 + 20 + 30)
    assert not MEMORY.short
    assert replace(MEMORY, total=3000).short
    told = dict(replace(MEMORY, activations=None).words)
    assert told["memory"].startswith("at least 4.0 kB for 2 processes that train and 1 that leads")
    assert "activations not measured" in told["of each"]


@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "intermediate.dense"]), ("llama", "all-linear")])
def test_what_many_rows_take_follows_from_one_and_two(tmp_path, kind, targets):
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, kind))
    base = tiny_world.save_base(tmp_path / "base", kind)
    task = {"max_length": 32, **({} if kind == "bert" else {"kind": "causal-lm"})}
    config = tiny_world.config(base, source, task=task, molora={"targets": targets}, train={"batch_size": 7})
    rows, task = load_rows(config.data, config.task)
    config = config.model_copy(update={"task": task})
    adapted = open_model(config, offline=True)
    owners = [(owner.name, adapted.task.encode(owner.train)) for owner in deal(config.data, rows, 0)]
    lengths = together([examples.lengths for _, examples in owners])
    found = memory(config, adapted, machine_of(config, adapted.model, adapted.kernels, lengths, 3), owners)
    assert 4 * adapted.model.base_parameters <= found.base < 4 * adapted.model.base_parameters + 10_000
    assert found.adapter == 8 * adapted.model.n_parameters
    assert found.rest is None or found.rest > 10**7
    longest = max((row for _, examples in owners for row in examples), key=lambda row: len(row.input_ids))
    with rehearsal(config, adapted) as stage:
        (actor,) = stage.actors(owners[:1])
        actor.rows = [longest] * 7
        peak = Peak([adapted.model.values, adapted.model.grads, *adapted.model.parameters()])
        with peak:
            stage.train([actor], 2)
    assert found.activations == pytest.approx(peak.most - found.optimiser, rel=0.03)
