"""What `molehill check` foretells of a run is what the run then counts."""

from __future__ import annotations

import pytest
import tiny_world

from molehill_simulation.describe import describe
from molehill_simulation.simulate import simulate

EXACT = {"up": "fp32", "down": "fp32"}
MASKED = {"privacy": {"secure_aggregation": True}, "round": {"norm_bound": 100.0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(60, "bert"))
    return tiny_world.save_base(folder / "base", "bert"), source


@pytest.mark.parametrize(
    ("federation", "sections"),
    [
        ({"preset": "fedit"}, {}),
        ({"preset": "ffa", "select": {"name": "round_robin", "count": 2}}, {}),
        ({"preset": "rolora"}, {}),
        ({"preset": "hetlora", "policy": {"name": "mixed_rank", "ranks": [1, 2]}}, {}),
        ({"preset": "fedsvd"}, {}),
        ({"policy": "local"}, {}),
        ({"policy": {"name": "fedpeft", "group": "head"}}, {}),
        ({"preset": "fedit"}, {"molora": {"preset": "mov", "targets": ["query"]}, "personal": {"gate": "personal"}}),
        ({"preset": "fedit"}, MASKED),
    ],
)
def test_trained_parameters_and_bytes_are_those_of_the_run(world, tmp_path, federation, sections):
    sections = {"molora": {"selector": "dense"}, **sections}
    config = tiny_world.config(*world, federation=federation, wire=EXACT, evaluate={"baselines": False}, **sections)
    told = describe(config)
    assert told.parameters is not None
    assert told.traffic is not None
    assert not told.traffic.varies
    simulate(config, tmp_path / "run")
    (start,) = tiny_world.events(tmp_path / "run", "start")
    assert start["parameters"] == told.parameters.trained
    assert f"{told.parameters.trained:,}<" in (tmp_path / "run" / "report.html").read_text()
    traffic, asked = told.traffic, told.traffic.asked
    rounds = tiny_world.events(tmp_path / "run", "round")
    assert {len(event["accepted"]) for event in rounds} == {asked}
    few = 12 * asked  # counts of rows and tokens take a byte more or less
    for event in rounds:
        up = traffic.round_up[(event["round"] - 1) % len(traffic.round_up)]
        if len(set(traffic.up[0])) == 1:
            assert event["bytes_up"] == pytest.approx(up, abs=few)
        else:
            assert asked * min(traffic.up[0]) - few <= event["bytes_up"] <= asked * max(traffic.up[0]) + few
    assert rounds[0]["bytes_down"] == asked * traffic.first
    if asked == config.data.clients:
        assert rounds[1]["bytes_down"] == asked * traffic.later[0]
        total = tiny_world.events(tmp_path / "run", "end")[0]
        assert total["bytes_down"] == traffic.total_down


def test_what_a_codec_compresses_is_told_of_noise_and_a_message_that_is_too_large_is_warned_of(world):
    wire = {"up": {"name": "int8", "zstd": True}, "max_bytes": 1024}
    told = describe(tiny_world.config(*world, wire=wire))
    assert told.traffic is not None
    assert told.traffic.varies
    plain = describe(tiny_world.config(*world, wire={"up": "int8"})).traffic
    assert plain is not None
    assert told.traffic.up[0][0] > 0.9 * plain.up[0][0]  # zeros would take next to nothing
    assert "by encoding random numbers" in dict(told.plan)["bytes"]
    assert any("wire.max_bytes" in text and "1,024 bytes" in text for text in told.warnings)
