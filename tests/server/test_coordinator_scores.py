"""Scores of the final model, told by clients or not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from toy_federation import config

from molehill.errors import FederationError


def speechless(run, numbers):
    """Of these clients, what they answer when they are scored is nonsense."""
    for number in numbers:
        client = run.transport.clients[number + 10]
        client.evaluate = lambda plan: SimpleNamespace(model_dump_json=lambda: "nonsense")


def test_a_client_that_cannot_be_scored_is_told_and_keeps_its_place(toy):
    run = toy(config(evaluate={"baselines": True}))
    coordinator = run.start()
    speechless(run, [1])
    coordinator.run()
    (failed,) = run.events("failed")
    assert (failed["stage"], failed["client"]) == ("evaluate", "client-1")
    assert "malformed answer" in failed["reason"]
    assert [event["stage"] for event in run.events("stage")] == ["baseline", "evaluate"]
    stages = {event["client"]: set(event["stages"]) for event in run.events("evaluation")}
    assert stages.pop("client-1") == {"base", "local"}
    assert set(map(frozenset, stages.values())) == {frozenset({"base", "local", "global", "personalised"})}
    assert run.events("end")


ANSWERS = {
    "n": 2, "exact_match": 1, "normalised_match": 1, "rouge_l": 1.0, "rouge_l_squares": 1.0, "chrf": 1.0,
    "chrf_squares": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said["stages"]["global"].update(accuracy=1e9), "stages.global.accuracy: Input should be less"),
        (
            lambda said: said["stages"]["global"].update(macro_f1=-0.1),
            "stages.global.macro_f1: Input should be greater",
        ),
        (
            lambda said: said["stages"]["global"].update(accuracy_interval=[0.7, 0.6]),
            "stages.global.accuracy_interval: Value error, its ends are the wrong way round",
        ),
        (
            lambda said: said["stages"]["global"].update(loss_interval=[0.7, 1e300]),
            "stages.global.loss_interval.1: Input should be less",
        ),
        (lambda said: said["stages"]["global"].update(loss=float("nan")), "stages.global.loss: Input should be"),
        (lambda said: said["stages"]["global"].update(loss=1e300), "stages.global.loss: Input should be less"),
        (lambda said: said["stages"]["global"].update(accuracy=None), "it does not tell the accuracy of stage global"),
        (
            lambda said: said["stages"]["global"].update(figures={"rmse": {"value": 1.0}}),
            "it measures 'rmse', which means nothing of a classification",
        ),
        (
            lambda said: said["stages"]["global"].update(figures={"accuracy": {"value": 1e9}}),
            "its accuracy of stage global is 1e+09, which cannot be",
        ),
        (lambda said: said.update(answers={"global": ANSWERS}), "it has answers of ['global'], where those to 0 rows"),
        (lambda said: said.update(answers={"global": {**ANSWERS, "n": 0}}), "answers.global.n: Input should be"),
        (
            lambda said: said.update(gains={"rmse": {"value": 0.1}}),
            "it tells a gain of 'rmse', which means nothing of a classification",
        ),
        (
            lambda said: said.update(gains={"accuracy": {"value": 1.2}}),
            "its gain in accuracy is 1.2 (1.2 to 1.2), which cannot be",
        ),
        (
            lambda said: said.update(gains={"accuracy": {"value": 0.2, "interval": [0.3, 0.4]}}),
            "its gain in accuracy is 0.2 (0.3 to 0.4), which cannot be",
        ),
        (
            lambda said: said.update(gains={"macro_f1": {"value": 0.2, "interval": [-2, 0.4]}}),
            "its gain in macro_f1 is 0.2 (-2 to 0.4), which cannot be",
        ),
        (lambda said: said.update(gains={"loss": {"value": 1e300}}), "gains.loss.value: Input should be less"),
        (lambda said: said.update(tokens={"e0": float("inf")}), "tokens.e0: Input should be a finite number"),
        (lambda said: said.update(tokens={"e0": -1.0}), "tokens.e0: Input should be greater"),
        (lambda said: said.update(tokens={"e9": 1.0}), "it counts tokens for the foreign expert 'e9'"),
        (lambda said: said.update(client="client-2"), "the answer is of client 'client-2'"),
        (lambda said: said["stages"].update(base=said["stages"]["global"]), "its scores are of ['base', 'global', "),
        (lambda said: said["stages"].pop("global"), "its scores are of ['personalised'], not of ['global', "),
    ],
)
def test_scores_that_cannot_be_are_refused(toy, change, why):
    run = toy(config(run={"rounds": 1}, evaluate={"baselines": True}))
    coordinator = run.start()
    liar = run.transport.clients[11]
    honest = liar.evaluate

    def evaluate(plan):
        said = honest(plan).model_dump()
        change(said)
        return SimpleNamespace(model_dump_json=lambda: json.dumps(said))

    liar.evaluate = evaluate
    coordinator.run()
    (failed,) = run.events("failed")
    assert (failed["stage"], failed["client"]) == ("evaluate", "client-1")
    assert why in failed["reason"]
    stages = {event["client"]: set(event["stages"]) for event in run.events("evaluation")}
    assert stages["client-1"] == {"base", "local"}


@pytest.mark.parametrize("baselines", [True, False])
def test_gains_are_told_of_runs_with_baselines_alone(toy, baselines):
    run = toy(config(run={"rounds": 1}, evaluate={"baselines": baselines}))
    coordinator = run.start()
    teller = run.transport.clients[11]
    honest, gain = teller.evaluate, {"value": -0.5, "interval": (-0.75, 0.25)}
    gains = {"accuracy": gain, "loss": {"value": -50.0, "interval": None}}

    def evaluate(plan):
        said = {**honest(plan).model_dump(), "gains": gains}
        return SimpleNamespace(model_dump_json=lambda: json.dumps(said))

    teller.evaluate = evaluate
    coordinator.run()
    if baselines:
        told = {event["client"]: event["gains"] for event in run.events("evaluation")}
        assert told.pop("client-1") == {**gains, "accuracy": {"value": -0.5, "interval": [-0.75, 0.25]}}
        assert not any(told.values())
    else:
        (failed,) = run.events("failed")
        assert failed["reason"] == "it tells gains over a baseline, where there is none"


PRIVATE = {"clip": 1.0, "noise": 4.0, "epsilon": 50.0, "delta": 1e-5}


@pytest.mark.parametrize(("privacy", "said"), [({}, "fitted_model"), ({}, "another"), (PRIVATE, "fitted_model")])
def test_a_choice_is_one_of_the_candidates_and_told_in_the_open_alone(toy, privacy, said):
    personal = {"holdout": 0.2, "candidates": ["shared_model", "fitted_model"]}
    run = toy(config(run={"rounds": 1}, personal=personal, evaluate={"baselines": False}, privacy=privacy))
    coordinator = run.start()
    teller = run.transport.clients[11]
    honest = teller.evaluate
    teller.evaluate = lambda plan: honest(plan).model_copy(update={"chosen": said})
    coordinator.run()
    told = {event["client"]: event["chosen"] for event in run.events("evaluation")}
    reasons = {event["client"]: event["reason"] for event in run.events("failed")}
    if privacy or said == "another":
        assert told["client-1"] == ""
        assert reasons["client-1"] == f"it chose '{said}', which it was not asked to"
    else:
        assert told["client-1"] == said


def test_a_run_whose_clients_cannot_be_scored_is_no_success(toy):
    run = toy(config(run={"rounds": 1}))
    coordinator = run.start()
    speechless(run, range(4))
    with pytest.raises(FederationError, match=r"no client could be scored with the final model: client-0: malformed"):
        coordinator.run()
    assert [(event["n_train"], event["stages"]) for event in run.events("evaluation")] == [
        (rows, {}) for rows in (10, 15, 20, 25)
    ]
    assert run.events("end") == []
    run.start().run()
    assert len(run.events("round")) == 1
    assert all(event["stages"] for event in run.events("evaluation"))


def test_a_client_that_left_before_the_end_is_told(toy):
    run = toy(config(run={"rounds": 1}))
    coordinator = run.start()
    nodes, pushed = run.transport.nodes, run.transport.pushed
    run.transport.nodes = lambda: nodes()[: 3 if pushed and pushed[-1].kind == "train" else None]
    coordinator.run()
    (failed,) = run.events("failed")
    assert (failed["client"], failed["reason"]) == ("client-3", "it is not connected")
