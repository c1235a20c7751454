"""What a machine is asked to do at once, where ``engine`` leaves it to us."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from molehill.config import parse
from molehill.tasks.kernels import Company, Kernels
from molehill.tasks.lengths import Lengths
from molehill_simulation import engine

LARGE = engine.SMALL


@pytest.mark.parametrize(
    ("given", "parameters", "gpu", "clients", "chosen"),
    [
        ({}, LARGE, False, 8, (2, 4)),
        ({}, LARGE, False, 3, (2, 2)),  # while every worker has a group of its own
        ({}, LARGE, False, 1, (1, 1)),
        ({"workers": 1}, LARGE, False, 8, (1, 8)),
        ({"workers": 8}, LARGE, False, 8, (8, 1)),
        ({"together": 3}, LARGE, False, 8, (2, 3)),
        ({}, LARGE - 1, False, 8, (1, 1)),
        ({}, LARGE, True, 8, (1, 4)),
        ({}, LARGE, True, 2, (1, 2)),
        ({"workers": 3, "together": 5}, LARGE - 1, True, 8, (3, 5)),
    ],
)
def test_workers_and_groups(given, parameters, gpu, clients, chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "cores", lambda: 2)
    monkeypatch.setattr(engine, "company", lambda _, *size: asked.append(size) or Company(8, "why"))
    config = parse({"engine": given, "task": {"max_length": 10}, "train": {"batch_size": 4}})
    settings = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=48))
    model = SimpleNamespace(
        base_parameters=parameters, flat=SimpleNamespace(is_cuda=gpu), base=SimpleNamespace(config=settings)
    )
    kernels = Kernels("fp32", "mkl", "products", "torch")
    machine = engine.machine_of(config, model, kernels, Lengths((4, 8, 99), 10), clients)
    assert (machine.workers, machine.together) == chosen
    assert set(asked) <= {(48, 29)}  # four rows of 22 / 3 tokens
    assert machine.why == ("products; why" if asked else "products")


@pytest.mark.parametrize(
    ("given", "parameters", "device"),
    [
        ({}, LARGE, "cpu"),
        ({}, LARGE - 1, "cpu"),
        ({"workers": 3}, LARGE - 1, "cpu"),
        ({"workers": 1}, LARGE, "cpu"),
        ({}, None, "cpu"),
        ({}, LARGE, "nowhere"),
    ],
)
def test_processes_that_start_before_the_base_is_loaded_are_as_many_as_will_be_needed(
    given, parameters, device, monkeypatch
):
    monkeypatch.setattr(engine, "cores", lambda: 2)
    monkeypatch.setattr(engine, "stored_bytes", lambda base: parameters and 4 * parameters)
    config = parse({"engine": given, "base": {"device": device}})
    needed = given.get("workers", 2 if parameters == LARGE and device == "cpu" else 1)
    assert engine.sure_workers(config) == needed
