"""The gain over alone: of pairs of predictions on the same rows, computed where the rows are."""

from __future__ import annotations

import pytest

from molehill.tasks.kind import kind_of
from molehill.tasks.outcomes import gains
from molehill_client.state import StateStore

MEASURED = {"accuracy", "macro_f1", "loss"}


@pytest.fixture
def home(house):
    return house(evaluate={"baselines": True}, train={"steps": 10, "lr": 2e-2})


def test_the_gain_is_the_difference_of_the_stages_and_of_the_rows(home):
    client = home.client(0)
    base = client.baseline(home.plan(0, 0))
    assert base.gains == {}
    reply = client.evaluate(home.plan(0))
    assert reply.gains.keys() == MEASURED
    local, ours = base.stages["local"], reply.stages["personalised"]
    kept = client.store.load_row_scores()
    assert kept.stages.keys() == {"base", "local", "global", "personalised"}
    for name, gain in reply.gains.items():
        sign = -1 if name == "loss" else 1
        assert gain.value == pytest.approx(sign * (getattr(ours, name) - getattr(local, name)))
        assert gain.interval[0] < gain.value < gain.interval[1]
        for stage, scores in {**base.stages, **reply.stages}.items():
            assert kept.stages[stage].parts[name].value() == pytest.approx(getattr(scores, name)), stage
    rows = [kept.stages[stage].parts["accuracy"] for stage in ("local", "personalised")]
    assert [list(part.rows) for part in rows] == [list(range(len(client.test_rows)))] * 2
    assert reply.gains["accuracy"].value == pytest.approx((rows[1].above - rows[0].above).mean())
    measures = kind_of(home.bench.config.task).measures
    assert gains(kept.stages["local"], kept.stages["personalised"], measures, kept.units) == reply.gains


def test_rows_keep_their_places_whatever_batches_they_are_scored_in(house):
    kept = []
    for name, size in (("a", 64), ("b", 3)):
        home = house(name, evaluate={"baselines": True, "batch_size": size})
        client = home.client(0)
        client.baseline(home.plan(0, 0))
        client.evaluate(home.plan(0))
        kept.append(client.store.load_row_scores().stages)
    for stage, found in kept[0].items():
        for name, part in found.parts.items():
            assert part.above == pytest.approx(kept[1][stage].parts[name].above, abs=1e-3), (stage, name)
    # The class of each row is that of the row.
    labels = [row.labels for row in client.test_rows]
    part = kept[0]["local"].parts["macro_f1"]
    assert [column for i, column in enumerate(part.columns) if i % 2 == 0] == labels


def test_without_a_baseline_of_this_run_there_is_no_gain(home, house):
    client = home.client(0)
    assert client.evaluate(home.plan(0)).gains == {}
    client.baseline(home.plan(0, 0))
    assert client.evaluate(home.plan(0)).gains
    another = home.client(0)
    another.store = StateStore(client.store.folder, "tiny", home.bench.base_digest, instance="another")
    assert another.evaluate(home.plan(0)).gains == {}
    off = house(evaluate={"baselines": False})  # in the same folder
    assert off.client(0).evaluate(off.plan(0)).gains == {}
