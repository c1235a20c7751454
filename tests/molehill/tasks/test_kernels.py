"""The choice of kernels: by what was measured, once per machine, and without another function."""

from __future__ import annotations

import json

import pytest
import torch

from molehill.tasks import kernels
from molehill.tasks.kernels import Kernels, choose, company, decide, fast_attention, use

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path))
    yield tmp_path / "kernels"
    use(Kernels("fp32", "mkl", ""))


def another_process():
    """Forget what this one has measured."""
    kernels._KNOWN.clear()


@pytest.mark.parametrize(
    ("times", "precision", "chosen"),
    [
        ({"mkl": 1.0}, "auto", ("fp32", "mkl")),
        ({"mkl": 1.0, "onednn": 0.95}, "fp32", ("fp32", "mkl")),  # too little to leave torch's own choice for
        ({"mkl": 1.0, "onednn": 0.5}, "fp32", ("fp32", "onednn")),
        ({"mkl": 1.0, "onednn": 0.5, "bf16": 0.4}, "auto", ("fp32", "onednn")),
        ({"mkl": 1.0, "onednn": 0.5, "bf16": 0.2}, "auto", ("bf16", "onednn")),
        ({"mkl": 1.0, "bf16": 0.2}, "fp32", ("fp32", "mkl")),
    ],
)
def test_the_fastest_is_chosen(times, precision, chosen):
    found = decide(times, precision)
    assert found[:2] == chosen
    assert all(f"{name} {value:.2f} ms" in found.why for name, value in times.items())


def test_what_was_asked_for_is_not_measured(cache):
    assert choose("bf16", CPU, 64)[:2] == ("bf16", "mkl")
    assert choose("fp32", torch.device("meta"), 64)[:2] == ("fp32", "mkl")
    assert choose("auto", torch.device("meta"), 64).precision == "fp32"
    assert not cache.exists()


def test_a_machine_is_measured_once_for_all_its_processes(cache):
    first = choose("auto", CPU, 33)
    (path,) = cache.iterdir()
    measured = json.loads(path.read_text())
    assert {"mkl"} <= set(measured) <= {"mkl", "onednn", "bf16"}
    another_process()
    path.write_text(json.dumps({"mkl": 8.0, "onednn": 2.0}))
    assert choose("auto", CPU, 64)[:2] == ("fp32", "onednn")  # as wide to a product as 33
    another_process()
    path.write_text("{")
    assert choose("fp32", CPU, 64).precision == "fp32"
    assert set(json.loads(path.read_text())) == set(measured)
    assert first.why.startswith("a product takes mkl ")


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path / "file"))
    assert choose("fp32", CPU, 64).precision == "fp32"


def test_another_kernel_computes_the_same_product():
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    products = {}
    for name in ("mkl", "onednn"):
        use(Kernels("fp32", name, ""))
        products[name] = x @ weight
    exact = "onednn" in kernels._time_products(64)
    error = float((products["onednn"] - products["mkl"]).norm() / products["mkl"].norm())
    assert error < (1e-6 if exact else 1e-2)  # where it is not, it is no choice


@pytest.mark.parametrize("columns", [None, 16, "clients"])
def test_a_product_that_is_not_exact_is_no_choice(columns, monkeypatch):
    """Wide, thin or of several clients: one that is not is enough."""
    real = torch.Tensor.__matmul__

    def coarse(a, b):
        inexact = kernels._ONEDNN.matmul.fp32_precision == "bf16" and a.dtype == torch.float32
        this = {None: b.dim() == 2 and b.shape[1] > 16, 16: b.shape[-1] == 16, "clients": b.dim() == 3}[columns]
        return real(a, b).bfloat16().float() if inexact and this else real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert "onednn" not in kernels._time_products(32)


def test_processes_of_a_run_choose_alike_even_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path / "file"))
    choose("fp32", CPU, 64)
    told = {path: {"mkl": 8.0, "onednn": 2.0} for path in kernels.measured()}
    another_process()
    kernels.learn(told)
    assert choose("fp32", CPU, 64).products == "onednn"


def test_who_is_slower_to_measure_goes_by_what_another_process_has_kept(cache):
    first = {"mkl": 1.0}

    def measure():
        kernels._kept(path, first)  # meanwhile
        return {"mkl": 2.0}

    choose("fp32", CPU, 64)
    (path,) = cache.iterdir()
    path.unlink()
    another_process()
    assert kernels._remembered(f"products {kernels._class(64)}", measure) == first


def test_who_is_trained_in_the_same_passes_is_measured_and_remembered(cache):
    kernel = Kernels("fp32", "mkl", "")
    assert company(kernel, 48, 30).clients in {1, 2, 4, 8}
    (path,) = cache.iterdir()
    another_process()
    path.write_text(json.dumps({"1": 1.0, "2": 1.9, "4": 2.0}))
    assert company(kernel, 64, 32) == (2, "2 clients in the same passes are 1.90 times as fast as one after another")


@pytest.mark.parametrize(("ours", "faster"), [(1.0, True), (1.9, False)])
def test_another_attention_has_to_be_faster(ours, faster, monkeypatch):
    monkeypatch.setattr(kernels, "_time_attention", lambda *_, **__: {"torch": 2.0, "products": ours})
    assert fast_attention(Kernels("fp32", "mkl", ""), 100, ordered=True) == faster


def test_both_attentions_are_measured_once(cache):
    first = fast_attention(Kernels("fp32", "mkl", ""), 30, ordered=False)
    (path,) = cache.iterdir()
    times = json.loads(path.read_text())
    assert set(times) == {"torch", "products"}
    assert first == (times["products"] < 0.9 * times["torch"])
    another_process()
    path.write_text(json.dumps({"torch": 2.0, "products": 1.0}))
    assert fast_attention(Kernels("fp32", "mkl", ""), 32, ordered=False)
