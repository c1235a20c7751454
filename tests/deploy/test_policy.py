"""An owner's policy among machines: who asks for more is refused by that lab, with the line, and the others go on."""

from __future__ import annotations

import json

import pytest
from lab import open_lab

pytestmark = pytest.mark.slow

POLICY = """\
[protection]
needs = "nothing"

[share]
tell = ["rows", "time", "loss", "tokens"]

[limits]
steps = 4
"""


def test_a_run_that_asks_for_more_goes_on_without_the_lab_that_refuses(config, tmp_path):
    with open_lab(tmp_path, config(run={"rounds": 1}, data={"clients": 2}), ("client-1", "client-2")) as lab:
        own = tmp_path / "policy.toml"
        own.write_text(POLICY)
        lab.up()
        lab.join("client-1", policy=own)
        lab.join("client-2")
        lab.finish(lab.run())
        assert sorted(lab.events("round")[0]["accepted"]) == ["client-1", "client-2"]
        lab.until(lambda: "agreed to run 'tiny': at most 1 round of 2 steps" in lab.said("client-1"))
        lab.until(lambda: "Under no policy of its own; agreement" in lab.said("client-2"))
        (agreed,) = (tmp_path / "client-1.state/agreed.jsonl").read_text().splitlines()
        assert json.loads(agreed)["digest"][:12] in lab.said("client-1")
        (untold,) = lab.events("failed")
        assert (untold["client"], untold["stage"]) == ("client-1", "evaluate")
        assert "share.tell is rows, time, loss, tokens (line 5)" in untold["reason"]
        assert {event["client"] for event in lab.events("evaluation") if event["stages"]} == {"client-2"}
        scored = lab.ask("client", "evaluate", "--state", tmp_path / "client-1.state", "--json")  # the owner may know
        assert "personalised" in json.loads(scored.stdout)["stages"], scored.stderr

        own.write_text(f'{POLICY}[data]\ncolumns = ["text", "label"]\n')  # read again for the next run
        lab.finish(lab.run("--set", "run.name=longer", "--set", "train.steps=5", out="longer"))
        (refused,) = lab.events("refused")
        assert refused["client"] == "client-1"
        assert "owner's policy refuses this run: train.steps is 5, limits.steps is 4 (line 8)" in refused["reason"]
        assert str(tmp_path) not in refused["reason"]  # a path of that machine is its own affair
        assert [event["accepted"] for event in lab.events("round")] == [["client-2"]]
        lab.until(lambda: f"{own}:8: its owner's policy refuses this run" in lab.said("client-1"))
