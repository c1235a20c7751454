"""What quantisation costs on real text: accuracy on held-out reviews, of the real MiniLM after a short federation."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.config import parse
from molehill.tasks.batches import alike
from molehill.tasks.kind import make_task
from molehill.tasks.schema import load_rows
from molehill_edge import Bundle, InsecureLocal
from molehill_export.export import Options, export
from molehill_simulation.data import deal
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

# Points of accuracy that may be lost: what is lost on so many rows, less two standard errors.
LIMITS = {"int8": 0.5, "int4": 1.0}


@pytest.mark.slow
def test_quantisation_loses_little_accuracy(tmp_path):
    config = parse(
        {
            "run": {"name": "reviews", "rounds": 1},
            "base": {"precision": "fp32", "device": "cpu"},
            "task": {"max_length": 24},
            "data": {"source": "sample:reviews", "clients": 2, "partition": "iid", "rows": 300, "test_rows": 40},
            "molora": {"targets": ["query", "value", "intermediate.dense"], "experts": 4, "rank": 8, "alpha": 64.0,
                       "scope": "layer"},
            "train": {"steps": 24, "batch_size": 16, "lr": 2e-3, "head_lr": 8e-3},
            "evaluate": {"baselines": False},
        }
    )  # fmt: skip
    simulate(config, tmp_path / "run")
    source = open_source(tmp_path / "run")
    rows, _ = load_rows(config.data, source.task)
    task = make_task(source.task, source.tokenizer)
    more = config.data.model_copy(update={"test_rows": 900})
    examples = [e for owner in deal(more, rows, config.run.seed) for e in task.encode(owner.test)]
    labels = np.array([example.labels for example in examples])
    (tmp_path / "few.jsonl").write_text('{"text": "a dull page", "label": "negative"}\n')  # we measure more below
    right = {}
    for scheme in ("fp32", *LIMITS):  # float32 is the original to 1e-4
        export(source, tmp_path / scheme, Options(scheme=scheme, rows=tmp_path / "few.jsonl"))
        with Bundle.open(tmp_path / scheme, trust=InsecureLocal(lambda _: None), threads=1) as bundle:
            found = np.empty(len(examples), np.int64)
            for indices in alike([len(example.input_ids) for example in examples], 0, 8):
                found[indices] = bundle.logits([examples[i].input_ids for i in indices]).argmax(-1)
        right[scheme] = 100.0 * (found == labels)
    assert right["fp32"].mean() > 50  # of three classes: it has learnt something
    lost = {scheme: right["fp32"] - right[scheme] for scheme in LIMITS}
    least = {scheme: each.mean() - 2 * each.std() / len(each) ** 0.5 for scheme, each in lost.items()}
    assert all(least[scheme] <= limit for scheme, limit in LIMITS.items()), (
        least,
        {k: v.mean() for k, v in lost.items()},
    )
