"""FedRouter: owners cluster their rows, the server clusters the clusters, and a row goes to the expert of its task."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny_world
import torch

import molehill
from molehill.config.methods import ref
from molehill.wire.keys import OWN_PLACES, PLACES, Key
from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

FLIPPED = {"positive": "negative", "neutral": "neutral", "negative": "positive"}
TOPICS = {"b": ("books",), "f": ("films",), "bf": ("books", "films")}


def rows():
    """Three owners: of books, of films, in which labels mean the opposite, and of both."""
    rng, found = random.Random(4), []
    for _ in range(240):
        owner = rng.choice(("b-1", "f-1", "bf-1"))
        topic, label = rng.choice(TOPICS[owner.partition("-")[0]]), rng.choice(list(tiny_world.LABELS))
        words = [*rng.choices(tiny_world.DOMAINS[topic], k=6), rng.choice(tiny_world.LABELS[label])]
        text = " ".join([*rng.sample(words, len(words)), rng.choice(tiny_world.FILLERS)])
        found.append({"text": text, "label": label if topic == "books" else FLIPPED[label], "domain": owner})
    return found


@pytest.fixture(scope="module")
def made(bert, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fedrouter")
    source = tiny_world.write_rows(folder / "rows.jsonl", rows())
    config = tiny_world.config(
        bert, source,
        run={"rounds": 3},
        data={"clients": 3, "partition": {"name": "by_column", "column": "domain"}},
        molora={"preset": "fedrouter", "experts": 2, "dropout": 0.0},
        personal={"gate": "split", "head": "global", "steps": 0},
        federation={"preset": "fedrouter"},
        wire={"up": "fp32", "down": "fp32"},
    )  # fmt: skip
    return config, folder / "run", simulate(config, folder / "run")


def places(tree, role):
    (found,) = [value for key, value in tree.items() if key.role == role]
    return found


def test_the_owner_of_both_topics_trains_both_experts_and_the_others_one(made):
    _, out, _ = made
    (decided,) = tiny_world.events(out, "assigned")
    trains = decided["trains"]
    assert decided["round"] == 1
    assert trains["bf-1"] == ["e0", "e1"]
    assert len(trains["b-1"]) == len(trains["f-1"]) == 1
    assert trains["b-1"] != trains["f-1"]
    assert not any(event["quarantined"] for event in tiny_world.events(out, "round"))


def test_rows_of_one_owner_go_to_the_experts_of_their_topics(made):
    _, out, _ = made
    (decided,) = tiny_world.events(out, "assigned")
    for who in ("bf-1", "global", "b-1"):
        with molehill.load(out, who) as model:
            for topic, owner in {"books": "b-1", "films": "f-1"}.items():
                topical = "b-1" if who == "b-1" else owner  # who has no films has no expert of them
                (expert,) = decided["trains"][topical]
                (shares,) = model.route(" ".join(tiny_world.DOMAINS[topic])).values()  # one for the whole network
                assert shares == {name: float(name == expert) for name in ("e0", "e1")}


def test_nothing_but_the_centres_of_clusters_leaves_and_centroids_are_means_of_them(made):
    _, out, _ = made
    final, states = load_tree(out / "final.safetensors")[0], tiny_world.states(out)
    (decided,) = tiny_world.events(out, "assigned")
    centroids = places(final, PLACES)
    found = {client: places(states[f"{client}/1"].tree, OWN_PLACES) for client in decided["trains"]}
    assert np.array_equal(found["bf-1"], places(states["bf-1/3"].tree, OWN_PLACES))  # they stay as they were found
    own = np.concatenate(list(found.values()))
    nearest = ((own[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    for number, centroid in enumerate(centroids):
        np.testing.assert_allclose(centroid, own[nearest == number].mean(0), atol=1e-5)
    assert not places(final, OWN_PLACES).any()  # the shared model knows nobody's


def test_experts_start_as_means_of_the_adapters_of_their_cluster(made, tmp_path):
    config, _, _ = made
    short = config.model_copy(update={"run": config.run.model_copy(update={"rounds": 1})})
    simulate(short, tmp_path / "run")
    formed, states = load_tree(tmp_path / "run" / "final.safetensors")[0], tiny_world.states(tmp_path / "run")
    (decided,) = tiny_world.events(tmp_path / "run", "assigned")
    sizes = {e["client"]: e["n_train"] for e in tiny_world.events(tmp_path / "run", "evaluation")}
    centroids, parts = places(formed, PLACES), []
    for client in decided["trains"]:
        tree = states[f"{client}/1"].tree
        for number, row in enumerate(places(tree, OWN_PLACES)):
            parts.append((client, f"e{number}", tree, int(((row - centroids) ** 2).sum(-1).argmin())))
    for key in [key for key in formed if key.kind == "B"]:
        mine = [(t[Key(key.site, e, "B")], sizes[c]) for c, e, t, at in parts if key.expert == f"e{at}"]
        values, weights = zip(*mine, strict=True)
        np.testing.assert_allclose(formed[key], np.average(values, axis=0, weights=weights), atol=1e-5)
        assert all(value.any() for value in values)


def test_a_run_that_stops_goes_on_as_if_it_had_not(made, tmp_path):
    config, out, _ = made
    tiny_world.stopped_after(1, config, tmp_path / "run")
    simulate(config, tmp_path / "run")
    ours, theirs = (load_tree(path / "final.safetensors")[0] for path in (tmp_path / "run", out))
    assert ours.digest == theirs.digest


def test_a_run_that_stops_in_its_warm_up_goes_on_with_what_was_told(made, tmp_path):
    config, _, _ = made
    longer = config.federation.model_copy(update={"assign": ref("task_clusters", warmup=2)})
    short = config.model_copy(update={"federation": longer, "run": config.run.model_copy(update={"rounds": 2})})
    simulate(short, tmp_path / "whole")
    tiny_world.stopped_after(1, short, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "round-00001" / "seen.safetensors").is_file()
    simulate(short, tmp_path / "run")
    whole, again = (load_tree(tmp_path / name / "final.safetensors")[0] for name in ("whole", "run"))
    assert whole.digest == again.digest
    assert places(whole, PLACES).any()
    decided = [tiny_world.events(tmp_path / name, "assigned") for name in ("whole", "run")]
    assert [event["round"] for event in decided[1]] == [2]
    assert [event["trains"] for event in decided[0]] == [event["trains"] for event in decided[1]]
